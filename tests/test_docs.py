import configparser
import itertools
import json
import pathlib
import pkgutil
import re
from typing import NamedTuple

import jsonschema
import orjson
import pytest
from asking import Validator
from starlette.routing import Route

import cerberus.__main__
from cerberus import app, environment, judging, settings, transactions, window
from cerberus.api import codes, openapi
from cerberus.decisions import models
from cerberus.features import evaluation, fences
from cerberus.features import packed as packed_windows
from cerberus.telemetry import metrics

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted(
    (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "feature_repo").glob("*.md"))
)
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
README, MODEL, WINDOWING = (TEXT[n] for n in ("README.md", "docs/model.md", "docs/windowing.md"))
SETTINGS, METRICS = (TEXT[n] for n in ("docs/settings.md", "docs/metrics.md"))
ALL = "\n".join(TEXT.values())
MOST_LINES = {"README.md": 200, "ARCHITECTURE.md": 150, "CONTRIBUTING.md": 120}
WIDEST = 120  # of a line in ARCHITECTURE.md, tables included
GROUPS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
# What says nothing to a reader of the project, and where a writer's machine would show.
FOREIGN = r"\bissues?\b|\bhelpers?\b|\bdesign\.md\b|(?<![\w.~])/(home|root|Users|tmp|work)/"


def blocks(text, language=r"\w*"):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


ASKED = [json.loads(body) for body in re.findall(r"-d '([^']+)'", README)]
ANSWERS = [json.loads(block) for block in blocks(README, "json") + blocks(METRICS, "json")]


def code(text):
    """Return what stands in code, a line or a span each."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*"".join(blocks(text)).splitlines(), *re.findall(r"`([^`]+)`", prose)]


def table(text, *header, marks=" `"):
    """Return the rows of the table with this header, as cells without `marks` around them."""
    lines = iter(text.splitlines())
    for line in lines:
        if line == f"| {' | '.join(header)} |":
            next(lines)
            rows = itertools.takewhile(lambda row: row.startswith("|"), lines)
            return [[cell.strip(marks) for cell in row[1:-1].split("|")] for row in rows]
    raise AssertionError(f"no table with the header {header}")


def named(pattern):
    return {name for line in code(ALL) for name in re.findall(pattern, line)}


def schema(name):
    document = openapi.document(("10m",), "USD")
    return document | {"$ref": f"#/components/schemas/{name}"}


def test_the_page_of_settings_is_what_their_declarations_say():
    tables = environment.tables(settings.Settings, environment.ROOT)
    page = TEXT["docs/settings.md"]
    assert environment.between_markers(page, tables) == page, "make docs"
    shown = set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.M))
    assert shown == {variable.name for variable in environment.declared(settings.Settings)}


def test_every_variable_that_a_page_names_exists():
    known = {variable.name for variable in environment.declared(settings.Settings)}
    assert named(r"\b(?:CERBERUS|KAFKA|REDIS|DATABASE)_[A-Z_]*[A-Z]\b") <= known


def test_the_table_of_metrics_is_what_is_exposed():
    exposed = re.findall(r"^# TYPE (cerberus_\w+)", metrics.Metrics().render().decode(), re.M)
    wanted = {name for name in exposed if not name.endswith("_created")}
    assert {name for name, _ in table(METRICS, "metric", "meaning")} == wanted


def test_every_route_is_in_the_readme_and_no_other():
    routes = {route.path: route.path_regex for route in app.app.routes if isinstance(route, Route)}
    shown = re.findall(r"localhost:8000(/[\w/.]+)", README)
    shown += [line.split()[-1] for line in code(README) if re.match(r"((GET|POST) )?/[a-z.]", line)]
    matched = {path: [p for p, r in routes.items() if r.match(path)] for path in shown}
    assert all(matched.values()), matched
    assert {path for paths in matched.values() for path in paths} == routes.keys()


def test_every_target_and_command_that_a_page_names_exists(capsys):
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    assert named(r"(?<!\w)make ([a-z]+)") <= targets
    with pytest.raises(SystemExit):
        cerberus.__main__.main(["--help"])
    commands = set(re.findall(r"^    ([a-z]+)", capsys.readouterr().out, re.M))
    assert named(r"(?:-m |^|[`\s])cerberus ([a-z]+)") <= commands


def test_every_test_and_file_that_a_page_names_exists():
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("*.py"))
    functions = named(r"(?<![\w/])test_\w+\b(?!\.py)|(?<=PartitionLife\.)\w+")
    assert {name for name in functions if f"def {name}(" not in tests} == set()


@pytest.mark.parametrize("name", TEXT)
def test_every_path_in_a_page_leads_to_a_file(name):
    roots = (ROOT, ROOT / "cerberus", ROOT / "tests", (ROOT / name).parent)
    paths = {
        path
        for line in code(TEXT[name])
        for path in re.findall(r"(?<![\w/.])[\w/]+\.py\b|^[a-z_/]+/$", line)
    }
    assert {path for path in paths if not any((root / path).exists() for root in roots)} == set()


@pytest.mark.parametrize("name", TEXT)
def test_every_function_that_a_page_calls_exists(name):
    for called in re.findall(r"`([a-z_.]+\.\w+)\(\)`", TEXT[name]):
        assert callable(pkgutil.resolve_name(f"cerberus.{called}")), called


@pytest.mark.parametrize("name", TEXT)
def test_what_a_page_places_in_a_file_is_there(name):
    in_file = re.findall(r"`([\w.]+)`(?: in | \()`([\w/]+\.py)`", TEXT[name])
    for file, listed in re.findall(r"`([\w/]+\.py)` \(([^)]+)\)", TEXT[name]):
        in_file += [(each, file) for each in re.findall(r"`(\w+)`", listed)]
    for placed, file in in_file:
        [found] = [r / file for r in (ROOT, ROOT / "cerberus") if (r / file).exists()]
        assert re.search(rf"\b{placed.rpartition('.')[2]}\b", found.read_text()), (placed, file)


@pytest.mark.parametrize("name", TEXT)
def test_links_within_the_project_resolve(name):
    for link in re.findall(r"\]\(([^)]+)\)", TEXT[name]):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.is_file(), link
        titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, link


@pytest.mark.parametrize("name", TEXT)
def test_a_page_speaks_of_the_project_alone(name):
    assert [found[0] for found in re.finditer(FOREIGN, TEXT[name], re.IGNORECASE)] == []


@pytest.mark.parametrize("name", MOST_LINES)
def test_a_page_is_no_longer_than_can_be_read(name):
    assert len(TEXT[name].splitlines()) <= MOST_LINES[name]


def test_the_architecture_fits_on_a_screen():
    assert [line for line in TEXT["ARCHITECTURE.md"].splitlines() if len(line) > WIDEST] == []


def test_the_layers_are_those_that_the_linter_enforces():
    linter = configparser.ConfigParser()
    linter.read(ROOT / ".importlinter")
    enforced = linter["importlinter:contract:layers"]["layers"].split("\n")
    assert [line.strip() for line in enforced if line.strip()] in [
        block.splitlines() for block in blocks(TEXT["ARCHITECTURE.md"])
    ]
    packages = {file.parent.name for file in (ROOT / "cerberus").glob("*/__init__.py")}
    assert packages <= set(code(TEXT["ARCHITECTURE.md"])), "each is described"


def test_the_singletons_are_those_of_the_code():
    sources = (ROOT / "cerberus").rglob("*.py")
    [row] = [r for r in TEXT["ARCHITECTURE.md"].splitlines() if r.startswith("| singletons ")]
    held = {n for file in sources for n in re.findall(r'\.singleton\("(\w+)"\)', file.read_text())}
    assert held == set(code(row))


def test_a_figure_is_the_same_on_both_pages():
    header = ("what", "figure", "command")
    assert table(TEXT["docs/measurements.md"], *header) == table(TEXT["docs/scaling.md"], *header)


def test_the_changelog_keeps_its_form():
    text = TEXT["CHANGELOG.md"]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[0] == "[Unreleased]"
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= GROUPS


def test_requests_and_answers_that_are_shown_keep_the_contract():
    by_kind = {"Prediction": "prediction", "Problem": "code", "Health": "tasks"}
    kinds = [next(kind for kind, key in by_kind.items() if key in answer) for answer in ANSWERS]
    assert set(kinds) == set(by_kind)
    refused = [kind == "Problem" for kind in kinds if kind != "Health"]
    assert refused.count(True) == 1
    for request, wrong in zip(ASKED, refused, strict=True):
        assert Validator(schema("Request")).is_valid(request) is not wrong
    for kind, answer in zip(kinds, ANSWERS, strict=True):
        jsonschema.validate(answer, schema(kind))
        known = openapi.document(("10m",), "USD")["components"]["schemas"][kind]["properties"]
        assert answer.keys() <= known.keys()
        if kind == "Problem":
            told = (answer["code"], answer["detail"], answer.get("field"))
            assert answer == codes.problem(*told)


def test_the_decisions_in_the_readme_are_the_committed_model_s():
    model = models.Model.load(settings.MODEL_PATH, ("10m",))
    answers = [answer for answer in ANSWERS if "prediction" in answer]
    assert len(answers) > 1
    for answer in answers:
        asked = next(a for a in ASKED if a.get("transaction_id") == answer.get("transaction_id"))
        seen = answer["features"]
        stats = window.WindowStats(seen["txn_count_10m"], round(seen["total_amount_10m"] * 100))
        in_hand = transactions.parse_amount(asked) if "amount" in asked else None
        row = evaluation.FeatureRow(1005, 0, (stats,), seen["credit_score"], in_hand)
        [decision] = model.decide([row])
        assert decision.probability == pytest.approx(answer["probability"], rel=1e-6)
        assert decision.prediction == answer["prediction"]
        assert decision.action == answer["decision"]
        assert decision.model_sha256 == answer["model_version"]
        assert decision.policy_sha256 == answer["policy_version"]


def test_the_figures_of_the_model_are_its_manifest_s():
    path = models.manifest_path(settings.MODEL_PATH)
    manifest = orjson.loads(path.read_bytes())
    assert [name for name, _ in table(MODEL, "field", "content")] == list(manifest)
    assert f"threshold is {manifest['threshold']}" in MODEL
    names = ", ".join(f"`{name}`" for name in manifest["features"])
    assert names in MODEL
    columns = list(
        itertools.product(("transaction_in_hand", "user_alone"), ("model", "amount_only"))
    )
    header = ("in hand, model", "in hand, amount only", "user alone, model")
    rows = table(MODEL, "measure", *header, "user alone, amount only")
    found = manifest["metrics"]
    measures = found["user_alone"]["model"]
    assert [row[0] for row in rows] == ["rows", "fraud_rate", *measures]
    for measure, *shown in rows:
        of = [found[kind] if measure not in measures else found[kind][by] for kind, by in columns]
        form = "d" if measure == "rows" else ".4f"
        assert shown == [format(values[measure], form) for values in of], measure


def at_ms(clock):
    return transactions.parse_timestamp({"timestamp": f"2026-11-24T{clock}Z"})


def clock(ms):
    return transactions.format_ms(ms)[11:-1]


class Record(NamedTuple):
    """What is read of a Kafka record."""

    offset: int
    timestamp: int
    value: bytes


class Timeline:
    """The worked example of docs/windowing.md, computed."""

    def __init__(self):
        self.windows = window.PartitionWindows(window.Spans())
        self.paid = {}
        self.rows = []

    def take(self, offset, record_time, event_time, name, user, amount):
        paid = transactions.Transaction(
            name, int(user), round(float(amount) * 100), "USD", "", at_ms(event_time)
        )
        self.paid[name, event_time] = paid
        record = Record(int(offset), at_ms(record_time), transactions.encode(paid))
        verdict = judging.judge(record, "USD", self.windows.spans)
        outcome = "dead letter"
        if isinstance(verdict, transactions.Transaction):
            outcome = self.windows.observe(verdict).value
        touched = outcome == "accepted" and paid.user_id == 7
        self.rows.append(self.row(record.offset) if touched else self.rows[-1])
        return [outcome, clock(self.windows.frontier_ms), clock(self.windows.lower_ms)]

    def row(self, offset):
        user, spans = self.windows.user(7), self.windows.spans
        fence = fences.Fence(1, offset + 1, self.windows.frontier_ms)
        assert user is not None
        packed = packed_windows.pack(user, fence, 0, self.windows.lower_ms, spans)
        return packed_windows.unpack(packed, spans)

    def read(self, after, as_of, in_hand):
        recent = self.rows[int(after)]
        now_ms = max(at_ms(as_of), recent.fence.as_of_ms)  # some ask about an earlier moment
        state = fences.PartitionState(1, int(after) + 1, "live", caught_up_ms=now_ms)
        row = evaluation.as_of(
            evaluation.OnlineRow(7, recent, None, 0, state),
            at_ms(as_of),
            self.paid[in_hand, as_of] if in_hand else None,
            now_ms=now_ms,
            rules=evaluation.Rules(self.windows.spans, 60_000),
        )
        assert row.stats is not None
        [stats] = row.stats
        return [str(stats.count), f"{stats.total_minor / 100:.2f}", ", ".join(row.degraded)]


def test_the_worked_timeline_is_what_the_code_computes():
    timeline = Timeline()
    told = ("outcome", "frontier", "kept after")
    records = ("offset", "record timestamp", "event time", "id", "user", "amount")
    for row in table(WINDOWING, *records, *told):
        assert timeline.take(*row[:6]) == row[6:]
    moments = table(WINDOWING, "after", "as of", "in hand", "count", "total", "degraded")
    assert len(moments) > 5
    for row in moments:
        assert timeline.read(*row[:3]) == row[3:]


def test_every_reason_of_doubt_is_explained():
    told = [name for name, _ in table(WINDOWING, "reason", "meaning")]
    assert told == list(evaluation.Doubt)
    schemas = openapi.document(("10m",), "USD")["components"]["schemas"]
    assert schemas["Prediction"]["properties"]["degraded"]["items"]["$ref"].endswith("/Doubt")
    assert schemas["Doubt"]["enum"] == told
