"""The policy: never softer for a higher probability or a doubt, and a mistake names its field."""

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cerberus import errors, settings, transactions, window
from cerberus.decisions import models, policy
from cerberus.features import evaluation

RANK = {policy.APPROVE: 0, policy.REVIEW: 1, policy.DECLINE: 2}
CONTENT = {"review_at": 0.3, "decline_at": 0.7, "approve_degraded_up_to": 99.99}
DOUBT = ("stale",)

shares = st.floats(0, 1)
amounts = st.none() | st.integers(0, transactions.MAX_AMOUNT_MINOR)
doubts = st.sampled_from([(), DOUBT, ("warming", "owner_missing")])


def written(**changes):
    return orjson.dumps({k: v for k, v in (CONTENT | changes).items() if v is not ...})


@st.composite
def policies(draw):
    low, high = sorted([draw(shares), draw(shares)])
    most_minor = draw(st.integers(0, transactions.MAX_AMOUNT_MINOR))
    content = written(review_at=low, decline_at=high, approve_degraded_up_to=most_minor / 100)
    return policy.Policy.parse(content)


@given(policies(), shares, shares, amounts, doubts)
def test_a_higher_probability_is_never_treated_softer(rules, one, other, amount, degraded):
    low, high = sorted([one, other])
    softer, harder = (RANK[rules.decide(p, amount, degraded)] for p in (low, high))
    assert softer <= harder


@given(policies(), shares, amounts, doubts)
def test_a_doubt_is_never_treated_softer_and_declines_nobody(rules, probability, amount, degraded):
    sure = rules.decide(probability, amount, ())
    unsure = rules.decide(probability, amount, degraded)
    assert RANK[sure] <= RANK[unsure]
    assert (sure == policy.DECLINE) == (unsure == policy.DECLINE)


@given(policies(), shares, amounts, amounts)
def test_without_a_doubt_the_amount_decides_nothing(rules, probability, one, other):
    assert rules.decide(probability, one, ()) == rules.decide(probability, other, ())


@given(policies(), doubts.filter(len), st.floats(0, 1, exclude_max=True))
def test_in_doubt_what_may_be_approved_ends_at_the_cap(rules, degraded, share):
    below, most = share * rules.review_at, rules.approve_degraded_minor
    assume(below < rules.review_at)
    assert rules.decide(below, most, degraded) == policy.APPROVE
    assert rules.decide(below, most + 1, degraded) == policy.REVIEW
    assert rules.decide(below, None, degraded) == policy.REVIEW


@pytest.mark.parametrize(
    ("probability", "decision"),
    [
        (0.0, policy.APPROVE),
        (0.2999, policy.APPROVE),
        (0.3, policy.REVIEW),
        (0.6999, policy.REVIEW),
        (0.7, policy.DECLINE),
        (1.0, policy.DECLINE),
    ],
)
def test_a_threshold_belongs_to_what_is_above_it(probability, decision):
    rules = policy.Policy.parse(written())
    assert rules.decide(probability, 10**9, ()) == decision
    assert rules.decide(probability, 9_999, DOUBT) == decision


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"review_at": ...}, "review_at"),
        ({"decline_at": ...}, "decline_at"),
        ({"approve_degraded_up_to": ...}, "approve_degraded_up_to"),
        ({"revue_at": 0.3}, "revue_at"),
        ({"review_at": "0.3"}, "review_at"),
        ({"review_at": None}, "review_at"),
        ({"review_at": True}, "review_at"),
        ({"review_at": -0.1}, "review_at"),
        ({"review_at": 1.1, "decline_at": 1.2}, "review_at"),
        ({"decline_at": 0.29}, "decline_at"),
        ({"decline_at": 1.01}, "decline_at"),
        ({"decline_at": []}, "decline_at"),
        ({"approve_degraded_up_to": -1}, "approve_degraded_up_to"),
        ({"approve_degraded_up_to": 10**10 + 1}, "approve_degraded_up_to"),
        ({"approve_degraded_up_to": 0.001}, "approve_degraded_up_to"),
    ],
)
def test_a_mistake_names_its_field_and_the_file(tmp_path, changes, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        policy.Policy.parse(written(**changes))
    (path := tmp_path / "policy.json").write_bytes(written(**changes))
    with pytest.raises(errors.ConfigError) as caught:
        policy.Policy.load(path)
    assert str(caught.value).startswith(f"CERBERUS_POLICY: {path}: {field}: ")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'{"review_at": NaN}', b"\xff"])
def test_what_is_no_json_object_is_a_setting_s_fault(tmp_path, content):
    (path := tmp_path / "policy.json").write_bytes(content)
    with pytest.raises(errors.ConfigError, match="CERBERUS_POLICY: "):
        policy.Policy.load(path)
    with pytest.raises(errors.ConfigError, match="cannot read"):
        policy.Policy.load(tmp_path / "none.json")


def test_any_other_content_is_another_version():
    one, other = (policy.Policy.parse(written() + space) for space in (b"", b"\n"))
    assert one.sha256 != other.sha256
    assert (one.review_at, one.approve_degraded_minor) == (0.3, 9_999)


MODEL = models.Model.load(settings.MODEL_PATH, ("10m",))
rows = st.builds(
    evaluation.FeatureRow,
    user_id=st.just(1),
    as_of_ms=st.just(0),
    stats=st.none() | st.integers(0, 20).map(lambda n: (window.WindowStats(n, n * 40_000),)),
    credit_score=st.none() | st.integers(300, 850),
    amount_minor=amounts,
    degraded=doubts,
)


@hypothesis_settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=20))
def test_every_decision_of_the_model_is_the_policy_s(batch):
    for d in MODEL.decide(batch):
        assert d.action == MODEL.policy.decide(d.probability, d.row.amount_minor, d.row.degraded)
        assert d.policy_sha256 == MODEL.policy.sha256
