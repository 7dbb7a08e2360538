"""The figures in words, at both sides of every threshold."""

import copy

import pytest

from matrix_llm.diagnose.reading import read_figures, read_token_losses


def token_loss(name, cosine, norm, by_ce, by_kind):
    """One loss as `compare_losses` gives it, as far as it is read; the last two are shares of its gradient."""
    shares = {"by_ce": by_ce, "by_kind": by_kind}
    groups = {
        kind: {group: {"share_of_gradient": share} for group, share in each.items()} for kind, each in shares.items()
    }
    whole = {"hidden": {"cosine": cosine, "norm_ratio": norm}}
    return {"name": name, "gradients": {"all": {"all": whole}, **groups}}


SAME_CE = {"CE < 0.5": 0.3, "2 to 5": 0.5, "CE >= 5": 0.2}
CES = token_loss("ce", 1.0, 1.0, SAME_CE, {"digits": 0.3, "words": 0.7, "other": 0.0})


@pytest.fixture
def figures():
    """Those of a model much like SmolLM2."""
    both = {"hidden": {"cosine": 0.976, "norm_ratio": 0.81}, "head": {"cosine": 0.97, "norm_ratio": 0.8}}
    total = {"hidden": {"cosine": 0.995, "norm_ratio": 1.8}, "head": {"cosine": 0.99, "norm_ratio": 1.8}}
    gradients = {"all": {"all": {"mce": both, "sum": total}}}
    cosines = {"below 0.2": 0.1, "0.2 to 0.4": 0.3, "0.4 to 0.6": 0.3, "0.6 to 0.8": 0.2, "0.8 and more": 0.1}
    solver = {"hidden": 0.03, "reference_value": 1e-6, "reference_logits": 1e-5, "reference_check": "48 steps"}
    rows = {"mean_cosine": 0.44, "effective_rank": 54.0, "width": 576, "zero_rows": 0, "duplicate_rows": 0}
    return {
        "model": {"vocabulary": 49152},
        "rows": {"positions": 480, "positions_asked": 480},
        "settings": {
            "mce_weight_shown": 1.0, "trains_head": True, "solver": {"name": "krylov", "whole_vocabulary": False},
        },
        "head": {"in use": rows},
        "loss": {
            "all": {"all": {"ce": 1.43, "mce": {"in use": 1.1}}},
            "by_kind": {"digits": {"share_of_positions": 0.25, "ce": 1.0, "mce": {"in use": 0.56}},
                        "words": {"share_of_positions": 0.7, "ce": 1.0, "mce": {"in use": 0.8}},
                        "end": {"share_of_positions": 0.01, "ce": 1.0, "mce": {"in use": 0.1}}},
            "by_ce": {"CE < 0.5": {"share_of_positions": 0.75, "share_of_ce": 0.28},
                      "2 to 5": {"share_of_positions": 0.25, "share_of_ce": 0.72}},
        },
        "forgiven": {"in use": {"by_cosine": cosines}},
        "gradients": {"in use": gradients, "centred": copy.deepcopy(gradients)},
        "token_losses": {"losses": [
            CES, token_loss("dft", 0.7, 0.4, {}, {}), token_loss("power", None, 0.0, {}, {}),
            token_loss("gem", 0.9, 1.2, {}, {}),
        ], "own": "CE+MCE", "reading": {"dft": "It does something.", "gem": "Another."}},
        "solver": {"in use": solver},
    }  # fmt: skip


def change(figures, path, value):
    *parts, last = path.split("/")
    for part in parts:
        figures = figures[part]
    figures[last] = value


COSINE = "gradients/in use/all/all/mce/hidden/cosine"
RATIO = "gradients/in use/all/all/mce/hidden/norm_ratio"
CASES = [
    ({}, "1.8 times larger gradient. Adam"),
    ({}, "cosine of 0.44 on average"),
    ({}, "25 % of the positions have CE >= 2; they carry 72 % of CE"),
    ({}, "MCE is 0.77 of CE: it forgives 23 %, and 30 % of that"),
    ({}, 'of the kind "digits": there it is 0.56 of CE'),
    ({}, "Centring the token vectors changes little"),
    ({}, "3.0 % off in the hidden states' gradient of the whole loss: small"),
    ({COSINE: 0.9}, "Mostly a 1.8 times larger gradient, turned by 6 degrees"),
    (
        {COSINE: 0.6, "gradients/in use/all/all/sum/hidden/cosine": 0.8},
        "another objective: its gradient is turned by 37",
    ),
    ({COSINE: 0.6, RATIO: 0.05}, "too little to change much; mce_weight 20 would"),
    ({RATIO: 0.15, "settings/mce_weight_shown": 0.5}, "With the weight 0.5 it is 8 % of CE's gradient"),
    ({COSINE: None}, "nothing to compare"),
    ({"loss/all/all/ce": 10.7, "loss/all/all/mce/in use": 4.0}, "predicts nothing yet"),
    ({"loss/all/all/ce": 0.05, "loss/all/all/mce/in use": 0.02}, "nearly solved"),
    ({"loss/all/all/mce/in use": 0.05}, "forgives nearly everything"),
    ({"loss/all/all/mce/in use": 1.42}, "forgives nearly nothing"),
    ({"head/in use/mean_cosine": -0.01}, "share no direction"),
    ({"head/in use/zero_rows": 1200}, "1,200 zero rows"),
    ({"head/in use/duplicate_rows": 3}, "3 duplicate rows"),
    ({"gradients/centred/all/all/mce/hidden/cosine": 0.947}, "cosine is 0.947 instead of 0.976"),
    ({"settings/trains_head": False}, "head is frozen"),
    ({"gradients/in use/all/all/mce/head/cosine": 0.5}, "In the LM head's weight the cosine is 0.500"),
    ({"solver/in use/hidden": 0.01}, "1.0 % off in the hidden states' gradient of the whole loss: accurate"),
    ({"solver/in use/hidden": 0.0002}, "0.02 % off"),
    ({"solver/in use/hidden": 0.3}, "Raise mce_steps or mce_top_k."),
    ({"solver/in use/hidden": 0.3, "settings/solver/name": "taylor"}, "Set mce_solver: krylov."),
    ({"solver/in use/reference_logits": 0.05}, "could not be judged"),
    ({"rows/positions": 31}, "Only 31 positions"),
    ({"token_losses/own": "dft"}, "trains dft; MCE and CE + MCE are for comparison. It does something."),
    ({"token_losses/own": "kd+MCE"}, "trains kd+MCE; MCE and CE + MCE are for comparison. It could not be measured"),
    ({}, "from 0.40 (dft) to 1.20 (gem) times the norm of CE's"),
]


@pytest.mark.parametrize(("changes", "said"), CASES)
def test_a_sentence_follows_from_its_threshold(figures, changes, said):
    for path, value in changes.items():
        change(figures, path, value)
    assert said in " ".join(read_figures(figures))


@pytest.mark.parametrize(("path", "value", "unsaid"), [
    (COSINE, 0.94, "Adam"), (COSINE, 0.79, "Mostly"), ("loss/all/all/ce", 0.11, "solved"),
    ("loss/all/all/ce", 9.7, "nothing yet"), ("head/in use/mean_cosine", 0.19, "share a direction"),
    ("rows/positions", 480, "Only"), ("token_losses/own", "ce", "trains"), ("token_losses/own", "CE+MCE", "trains"),
    ("token_losses/losses", [CES, token_loss("dft", 0.7, 0.51, {}, {})], "norm of CE's"),
    ("loss/by_kind/digits/mce/in use", 0.7, "of the kind"),
])  # fmt: skip
def test_and_is_not_said_beyond_it(figures, path, value, unsaid):
    change(figures, path, value)
    assert unsaid not in " ".join(read_figures(figures))


SAME_KIND = {"digits": 0.3, "words": 0.7}


@pytest.mark.parametrize(("cosine", "norm", "by_ce", "by_kind", "said"), [
    (0.9995, 0.99, SAME_CE, SAME_KIND, "The same gradient as CE's."),
    (0.9995, 0.9, SAME_CE, SAME_KIND, "In CE's direction and 0.90 times as large; spread over the labels as CE's."),
    (0.96, 1.01, SAME_CE, SAME_KIND, "In CE's direction and as large; spread"),
    (0.94, 0.5, SAME_CE, SAME_KIND, "20 degrees from CE's gradient and 0.50 times"),
    (0.5, 0.05, SAME_CE, SAME_KIND, "Another direction, 60 degrees from CE's gradient, and 0.05 times"),
    (0.5, 1.0, {"CE < 0.5": 0.7, "2 to 5": 0.3}, SAME_KIND, "less of it at labels with CE >= 2 (30 %, CE's 70 %)."),
    (0.5, 1.0, {"2 to 5": 0.5, "CE >= 5": 0.24}, SAME_KIND, "spread over the labels as CE's"),
    (0.5, 1.0, {"2 to 5": 0.5, "CE >= 5": 0.5}, {"digits": 0.2, "words": 0.8},
     "more of it at labels with CE >= 2 (100 %, CE's 70 %) and more of it at words (80 %, CE's 70 %)."),
    (0.5, 1.0, SAME_CE, {"digits": 0.4, "words": 0.6}, "; more of it at digits (40 %, CE's 30 %)."),
    (0.5, 1.0, SAME_CE, {"other": 0.2, "words": 0.6}, "; more of it at other tokens (20 %, CE's 0 %)."),
    (None, 0.0, {}, {}, "nothing to compare"),
])  # fmt: skip
def test_a_token_losss_sentence_follows_from_its_figures(cosine, norm, by_ce, by_kind, said):
    found = read_token_losses({"losses": [CES, token_loss("dft", cosine, norm, by_ce, by_kind)]})
    assert list(found) == ["dft"]
    assert said in found["dft"]
