"""Each recipe of docs/history.md, run on ten rows in the shape of its data set."""

import argparse
import csv
import datetime
import gzip
import io
import json
import pathlib
import re
import shlex
import zoneinfo

import pyarrow
import pyarrow.parquet
import pytest

from cerberus import transactions
from cerberus.commands import load as load_command
from cerberus.files import datafiles, importing, layouts

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "history.md").read_text()
RECIPES = dict(
    re.findall(r"^```bash\n# ([^\n:(]*\w)[^\n]*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
)
BEGIN = datetime.datetime(2026, 3, 28, 23, 15, tzinfo=datetime.UTC)
HOUR_MS = 3_600_000
AMOUNTS = [5, 1250, 100, 99, 120055, 3848, 13409, 70, 1, 99999999]
WORDS = ("legitimate", "fraud")


def ms(moment, zone="UTC"):
    """Return ms since the epoch of a local time."""
    return int(moment.replace(tzinfo=zoneinfo.ZoneInfo(zone)).timestamp() * 1000)


def text(rows, delimiter=",", **how):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, **how)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def euros(cents):
    return f"{cents / 100:,.2f}".translate(str.maketrans(",.", ".,"))


def facts(ids, users, shops, times_ms, cents=tuple(AMOUNTS)):
    """Return the transactions that are wanted."""
    return [
        transactions.Transaction(str(name), int(user), amount, "USD", str(shop), at_ms)
        for name, user, amount, shop, at_ms in zip(ids, users, cents, shops, times_ms, strict=True)
    ]


def hours(origin, gap_ms=HOUR_MS):
    return [ms(origin) + gap_ms * i for i in range(10)]


def bank(path):
    rows = [
        {
            "trans_num": f"{i:032x}",
            "cc_num": 4_992_346_398_065_154_184 + i,
            "amt": AMOUNTS[i] / 100,
            "timestamp": transactions.format_ms(hours(BEGIN)[i]),
        }
        for i in range(10)
    ]
    (path / "bank.csv").write_text(text(rows))
    users = [4_992_346_398_065_154_184 + i for i in range(10)]
    return facts([f"{i:032x}" for i in range(10)], users, [""] * 10, hours(BEGIN)), None


def tabformer(path):
    moments = [BEGIN.replace(tzinfo=None) + datetime.timedelta(hours=i) for i in range(10)]
    rows = [
        {
            "User": i % 3,
            "Card": 0,
            "Year": at.year,
            "Month": at.month,
            "Day": at.day,
            "Time": f"{at:%H:%M}",
            "Amount": f"$-{AMOUNTS[i] / 100:.2f}" if i == 4 else f"${AMOUNTS[i] / 100:,.2f}",
            "Use Chip": "Swipe Transaction",
            "Merchant Name": -727_612_092_139_916_043 + i,
            "Errors?": "Bad PIN,Insufficient Balance" if i == 2 else "",
            "Is Fraud?": "Yes" if i % 2 else "No",
        }
        for i, at in enumerate(moments)
    ]
    (path / "card_transaction.v1.csv").write_text(text(rows))
    shops = [-727_612_092_139_916_043 + i for i in range(10)]
    times_ms = [ms(at, "America/New_York") for at in moments]
    wanted = facts([f"tf-{i + 1}" for i in range(10)], [i % 3 for i in range(10)], shops, times_ms)
    del wanted[4], rows[4]
    return wanted, [WORDS[row["Is Fraud?"] == "Yes"] for row in rows]


def paysim(path):
    rows = [
        {
            "step": i + 1,
            "type": "TRANSFER",
            "amount": AMOUNTS[i] / 100,
            "nameOrig": f"C{1_000_000_815 + i}",
            "oldbalanceOrg": 0.0,
            "nameDest": f"M{i}",
            "isFraud": i % 2,
        }
        for i in range(10)
    ]
    (path / "paysim.csv").write_text(text(rows))
    users, shops = [1_000_000_815 + i for i in range(10)], [f"M{i}" for i in range(10)]
    times_ms = hours(datetime.datetime(2026, 1, 1))  # noqa: DTZ001
    return facts([f"ps-{i + 1}" for i in range(10)], users, shops, times_ms), [
        WORDS[i % 2] for i in range(10)
    ]


def ieee(path):
    rows = [
        {
            "TransactionID": 2_990_000 + i,
            "isFraud": i % 2,
            "TransactionDT": 86_400 + 60 * i,
            "TransactionAmt": 75.887 if i == 3 else AMOUNTS[i] / 100,
            "card1": 13_926 + i,
        }
        for i in range(10)
    ]
    (path / "train_transaction.csv").write_text(text(rows))
    cents = [7589 if i == 3 else AMOUNTS[i] for i in range(10)]
    times_ms = hours(datetime.datetime(2017, 12, 1), 60_000)  # noqa: DTZ001
    users = [13_926 + i for i in range(10)]
    return facts([2_990_000 + i for i in range(10)], users, [""] * 10, times_ms, cents), [
        WORDS[i % 2] for i in range(10)
    ]


def ulb(path):
    rows = [
        {"Time": "1e+05" if i == 9 else 406 * i, "V1": -1.36, "Amount": AMOUNTS[i] / 100}
        | {"Class": str(i % 2)}
        for i in range(10)
    ]
    (path / "creditcard.csv").write_text(text(rows, quoting=csv.QUOTE_NONNUMERIC))
    origin = ms(datetime.datetime(2013, 9, 1))  # noqa: DTZ001
    times_ms = [origin + (100_000 if i == 9 else 406 * i) * 1000 for i in range(10)]
    return facts([f"ulb-{i + 1}" for i in range(10)], range(1, 11), [""] * 10, times_ms), [
        WORDS[i % 2] for i in range(10)
    ]


def s_ffsd(path):
    rows = [
        {
            "Time": i,
            "Source": f"S{10_000 + i}",
            "Target": f"T{i}",
            "Amount": 1.23456 if i == 2 else AMOUNTS[i] / 100,
            "Location": "L100",
            "Type": "TP100",
            "Labels": i % 3,
        }
        for i in range(10)
    ]
    (path / "S-FFSD.csv").write_text(text(rows))
    cents = [123 if i == 2 else AMOUNTS[i] for i in range(10)]
    times_ms = hours(datetime.datetime(2026, 1, 1), 1000)  # noqa: DTZ001
    users, shops = [10_000 + i for i in range(10)], [f"T{i}" for i in range(10)]
    return facts([f"sf-{i + 1}" for i in range(10)], users, shops, times_ms, cents), [
        WORDS[i % 3] for i in range(10) if i % 3 < 2
    ]


def handbook(path):
    times_ms = hours(BEGIN.replace(tzinfo=None))
    table = pyarrow.table(
        {
            "TRANSACTION_ID": list(range(10)),
            "TX_DATETIME": pyarrow.array([at * 10**6 for at in times_ms], pyarrow.timestamp("ns")),
            "CUSTOMER_ID": [str(596 + i) for i in range(10)],
            "TERMINAL_ID": [str(i) for i in range(10)],
            "TX_AMOUNT": [cents / 100 for cents in AMOUNTS],
            "TX_FRAUD": [i % 2 for i in range(10)],
        }
    )
    folder = path / "handbook"
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    for day, begin in ("2026-03-28", 0), ("2026-03-29", 5):
        (folder / f"TX_DATE={day}").mkdir()
        part = folder / f"TX_DATE={day}" / "part-0.snappy.parquet"
        pyarrow.parquet.write_table(table.slice(begin, 5), part)
    return facts(range(10), range(596, 606), range(10), times_ms), [WORDS[i % 2] for i in range(10)]


def sparkov(path):
    times_ms = hours(BEGIN.replace(tzinfo=None))
    rows = [
        {
            "": i,
            "trans_date_trans_time": transactions.format_ms(times_ms[i])[:19].replace("T", " "),
            "cc_num": 4_992_346_398_065_154_184,
            "merchant": "fraud_Kutch, Hermiston and Farrell",
            "amt": AMOUNTS[i] / 100,
            "trans_num": f"{i:032x}",
            "unix_time": times_ms[i] // 1000 - 7 * 365 * 86_400,
            "is_fraud": i % 2,
        }
        for i in range(10)
    ]
    (path / "fraudTrain.csv").write_text(text(rows))
    ids, users = [f"{i:032x}" for i in range(10)], [4_992_346_398_065_154_184] * 10
    shops = ["fraud_Kutch, Hermiston and Farrell"] * 10
    return facts(ids, users, shops, times_ms), [WORDS[i % 2] for i in range(10)]


def european(path):
    moments = [BEGIN.replace(tzinfo=None) + datetime.timedelta(hours=6 + i) for i in range(10)]
    rows = [
        {
            "Beleg": f"B-{i}",
            "Kunde": 7001,
            "Händler": "Bäckerei €",
            "Betrag": euros(AMOUNTS[i]),
            "Buchung": f"{at:%d.%m.%Y %H:%M}",
        }
        for i, at in enumerate(moments)
    ]
    head = "sep=;\r\nUmsätze; vom 28.03.2026\r\n\r\n"
    (path / "umsaetze.csv").write_bytes((head + text(rows, ";")).encode("cp1252"))
    times_ms = [ms(at, "Europe/Berlin") for at in moments]
    return facts([f"B-{i}" for i in range(10)], [7001] * 10, ["Bäckerei €"] * 10, times_ms), None


def databases(path):
    times_ms = hours(BEGIN.replace(tzinfo=None), 1_500)
    for kind, offset in ("postgres", "+00"), ("bigquery", " UTC"):
        rows = [
            {
                "transaction_id": f"{kind}-{i}",
                "user_id": 7,
                "amount": AMOUNTS[i] / 100,
                "timestamp": str(datetime.datetime.fromtimestamp(at / 1000, datetime.UTC))[:-6]
                + offset,
            }
            for i, at in enumerate(times_ms)
        ]
        (path / f"export-{kind}.csv.gz").write_bytes(gzip.compress(text(rows).encode()))
    names = [f"{kind}-{i}" for kind in ("bigquery", "postgres") for i in range(10)]
    return facts(names, [7] * 20, [""] * 20, times_ms * 2, AMOUNTS * 2), None


def mysql(path):
    moments = [BEGIN.replace(tzinfo=None) + datetime.timedelta(hours=i) for i in range(10)]
    rows = [
        {
            "id": i,
            "user_id": 7,
            "amount": f"{AMOUNTS[i] / 100:.2f}",
            "created": str(at),
            "shop": "NULL" if i % 2 else "Kiosk",
        }
        for i, at in enumerate(moments)
    ]
    (path / "mysql.tsv").write_text(text(rows, "\t"))
    shops, times_ms = ["Kiosk", ""] * 5, [ms(at, "Europe/Paris") for at in moments]
    return facts(range(10), [7] * 10, shops, times_ms), None


def oracle(path):
    times_ms = hours(BEGIN.replace(tzinfo=None))
    rows = [
        {
            "TX_ID": i,
            "CUST": 7,
            "AMOUNT": f"{AMOUNTS[i] / 100:.2f}".removeprefix("0"),
            "CREATED": datetime.datetime.fromtimestamp(at / 1000, datetime.UTC)
            .strftime("%d-%b-%y %I.%M.%S.%f000 %p")
            .upper(),
        }
        for i, at in enumerate(times_ms)
    ]
    (path / "oracle.csv").write_text(text(rows, quoting=csv.QUOTE_NONNUMERIC))
    return facts(range(10), [7] * 10, [""] * 10, times_ms), None


def java(path):
    times_ms = hours(BEGIN.replace(tzinfo=None), 1)
    rows = [
        {"id": i, "amount": AMOUNTS[i] / 100, "created": at, "card": {"owner": 2**62 + i}}
        for i, at in enumerate(times_ms)
    ]
    (path / "java.json").write_text(json.dumps(rows, indent=2))
    return facts(range(10), [2**62 + i for i in range(10)], [""] * 10, times_ms), None


def excel(path):
    moments = [BEGIN.replace(tzinfo=None) + datetime.timedelta(minutes=i) for i in range(10)]
    days = [(at - datetime.datetime(1899, 12, 30)) / datetime.timedelta(days=1) for at in moments]  # noqa: DTZ001
    rows = [
        {"transaction_id": i, "user_id": 7, "amount": AMOUNTS[i] / 100, "booked": f"{day:.8f}"}
        for i, day in enumerate(days)
    ]
    (path / "excel.txt").write_bytes(text(rows, "\t").encode("utf-16"))
    times_ms = [ms(at, "Europe/Berlin") for at in moments]
    return facts(range(10), [7] * 10, [""] * 10, times_ms), None


SETS = {
    "Other names": bank,
    "TabFormer": tabformer,
    "PaySim": paysim,
    "IEEE-CIS": ieee,
    "ULB": ulb,
    "S-FFSD": s_ffsd,
    "Fraud Detection Handbook": handbook,
    "Sparkov": sparkov,
    "A European CSV": european,
    "Postgres": databases,
    "MySQL": mysql,
    "Oracle": oracle,
    "Java": java,
    "Excel": excel,
}


def read(plan, kind):
    asked, root = plan.files[kind], datafiles.root_of(plan.files[kind])
    for path in datafiles.parts(asked):
        file = plan.layouts[kind].open(path, *importing.FIELDS[kind], root)
        for rows, _ in file.pieces(4):
            yield from rows


def planned(recipe):
    parser = argparse.ArgumentParser()
    load_command.add_arguments(parser)
    words = shlex.split(recipe.replace("\\\n", " "))
    return load_command._plan(parser.parse_args(words[words.index("import") + 1 :]))


@pytest.mark.parametrize("name", SETS)
def test_a_recipe_reads_its_set(tmp_path, monkeypatch, name):
    wanted, labels = SETS[name](tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = planned(RECIPES[name])
    found = [layouts.transaction(row, "USD") for row in read(plan, "transactions")]
    assert found == wanted
    if labels is not None:
        told = [layouts.label(row, 2**60) for row in read(plan, "labels")]
        assert [label.label for label in told] == labels
        known = {(each.transaction_id, each.event_ms) for each in wanted}
        assert known.issuperset((label.transaction_id, label.labelled_ms) for label in told)


def test_every_recipe_is_tested():
    there = {name for name, recipe in RECIPES.items() if "cerberus import" in recipe}
    assert there == set(SETS)
