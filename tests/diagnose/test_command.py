"""`matrix-llm diagnose`: the figures of a whole run of it, its page, and what is refused."""

import html.parser
import json
import math
import re
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from matrix_llm.base.errors import RecipeError
from matrix_llm.diagnose import diagnosis
from matrix_llm.diagnose.command import main
from matrix_llm.diagnose.diagnosis import check_memory
from matrix_llm.diagnose.page import draw_bars, render_page
from matrix_llm.diagnose.subject import find_subject, not_applied, read_model, read_rows
from matrix_llm.diagnose.text import ratio, render
from matrix_llm.loss.settings import LossSettings
from matrix_llm.model.lm_head import add_matrix_head
from matrix_llm.publish.command import main as hub
from tests.diagnose.conftest import OPTIONS, ROWS
from tests.support.finished_run import write_run
from tests.support.tiny import TINY, tiny_model

KEYS = ["format", "version", "model", "rows", "settings", "head", "forgiven", "gradients", "token_losses", "solver"]
KEYS += ["loss", "reading"]


def test_losses_are_the_means_that_training_has_on_the_same_rows(folder, diagnosed):
    figures = diagnosed[1]
    rows = read_rows(find_subject(str(folder), str(folder / "rows.jsonl"), OPTIONS).recipe, lambda line: None).train
    model = AutoModelForCausalLM.from_pretrained(folder)
    add_matrix_head(model, LossSettings())
    totals = torch.zeros(3, dtype=torch.float64)
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            out = model(input_ids=ids, labels=labels, matrix_loss=True)
        totals += torch.stack([out.cross_entropy.sum(), out.matrix_cross_entropy.sum(), out.label_mask.sum()]).double()
    whole = figures["loss"]["all"]["all"]
    assert whole["positions"] == totals[2]
    assert whole["ce"] == pytest.approx((totals[0] / totals[2]).item(), rel=1e-5)
    assert whole["mce"]["in use"] == pytest.approx((totals[1] / totals[2]).item(), rel=1e-4)


def test_the_object_says_what_was_measured_and_what_became_of_the_rows(diagnosed):
    figures = diagnosed[1]
    assert list(figures)[: len(KEYS)] == KEYS
    assert (figures["format"], figures["version"]) == ("matrix_llm.diagnosis", 1)
    rows, settings = figures["rows"], figures["settings"]
    assert (rows["read"], rows["trainable"], rows["rows_used"], rows["positions_asked"]) == (40, 40, 40, 100000)
    assert rows["positions"] == rows["trained_positions_in_them"] > 100
    assert rows["prompt_template"] == "plain"
    assert settings["mce_embeddings"] == "lm_head"
    assert settings["solver"]["whole_vocabulary"]
    assert figures["model"]["architecture"] == "Gemma2ForCausalLM"
    for kind in ("by_kind", "by_ce"):
        groups = figures["loss"][kind].values()
        assert sum(each["positions"] for each in groups) == rows["positions"]
        assert sum(each["share_of_ce"] for each in groups) == pytest.approx(1)
    forgiven = figures["forgiven"]["in use"]["nats"]
    whole = figures["loss"]["all"]["all"]
    assert forgiven == pytest.approx(whole["ce"] - whole["mce"]["in use"])


def test_centred_vectors_have_their_mean_taken_away(folder, diagnosed):
    rows = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight.detach().double()
    unit = torch.nn.functional.normalize(rows - rows.mean(0), dim=-1)
    mean = ((unit @ unit.T).sum() - 300) / (300 * 299)
    assert diagnosed[1]["head"]["centred"]["mean_cosine"] == pytest.approx(mean.item(), abs=1e-5)


# --- the page --------------------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    VOID = ("meta", "rect", "line")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links, self.boxes = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("svg", "table"):
            self.boxes.append((tag, dict(attributes).get("class"), self.open[-1]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_complete_needs_no_network_and_runs_nothing(diagnosed):
    tags = Tags()
    tags.feed((diagnosed[0] / "diagnosis.html").read_text())
    assert tags.open == []
    assert "script" not in tags.seen
    assert tags.links == []
    assert tags.seen.count("svg") == 7
    assert tags.seen.count("table") > 8


def test_on_a_telephone_plots_and_tables_scroll_in_boxes_of_their_own(diagnosed):
    page = (diagnosed[0] / "diagnosis.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert {(kind, parent) for tag, kind, parent in tags.boxes} == {(None, "div"), ("facts", "body")}
    assert page.count('<div class="wide">') == sum(parent == "div" for _, _, parent in tags.boxes)
    assert ".wide { overflow-x: auto; }" in page


def test_a_range_of_ce_is_named_as_one_beside_kinds_of_tokens(diagnosed):
    shown = {row[0] for row in render(diagnosed[1]).splitlines() for row in [row.split("  ")]}
    assert "CE 0.5 to 2" in shown or "CE 2 to 5" in shown
    assert not {"0.5 to 2", "2 to 5"} & shown


def test_the_token_losses_stand_in_one_table_on_the_screen_and_on_the_page(diagnosed):
    figures = diagnosed[1]
    found, screen = figures["token_losses"], render(figures)
    page = html.unescape((diagnosed[0] / "diagnosis.html").read_text())
    rows = {cells[0]: cells for cells in (re.split(" {2,}", line) for line in screen.splitlines())}
    names = [each["name"] for each in found["losses"]]
    assert (names[0], names[-2:]) == ("ce", ["mce", "CE+MCE"])
    for each in found["losses"]:
        whole = each["gradients"]["all"]["all"]
        cells = [f"{each['value']:.3f}", f"{whole['hidden']['cosine']:.3f}", ratio(whole["hidden"]["norm_ratio"])]
        cells += [f"{whole['head']['cosine']:.3f}", ratio(whole["head"]["norm_ratio"])]
        assert rows[each["name"]][1:6] == cells
        assert f"<td>{'</td><td>'.join([each['name'], *cells])}</td>" in page
    for kind in ("by_kind", "by_ce"):
        shares = [group["share_of_gradient"] for group in found["losses"][1]["gradients"][kind].values()]
        assert sum(shares) == pytest.approx(1)
    words = " ".join(screen.split())
    assert list(found["reading"]) == names[1:]
    for name, sentence in [*found["reading"].items(), ("asft, kd, soft_ce, soft_mce", found["left_out"]["kd"])]:
        assert f"- {name}: " in words
        assert sentence in words
        assert sentence in page
    mce = next(each for each in found["losses"] if each["name"] == "mce")["gradients"]["all"]["all"]
    assert mce["hidden"] == figures["gradients"]["in use"]["all"]["all"]["mce"]["hidden"]
    assert "12 other token losses" in figures["cost"]["seconds"]


def test_tokens_and_names_cannot_become_html(diagnosed):
    figures = json.loads(json.dumps(diagnosed[1]))
    figures["model"]["name"] = "<img src=x>"
    figures["head"]["in use"]["nearest"][0]["token"]["text"] = "'</script><script>alert(1)</script>'"
    figures["forgiven"]["in use"]["pairs"][0]["token"]["text"] = "'<i>'"
    page = render_page(figures)
    assert "&lt;img src=x&gt;" in page
    assert "&lt;/script&gt;" in page
    assert not {"img", "script", "i"} & set(_seen(page))


def _seen(page):
    tags = Tags()
    tags.feed(page)
    return tags.seen


def test_names_cannot_write_to_the_terminal(folder, tmp_path, capsys):
    shutil.copytree(folder, model := tmp_path / "a\x1b[31mb", ignore=shutil.ignore_patterns("out"))
    assert main([str(model), str(model / "rows.jsonl"), *OPTIONS, "--positions", "20"]) == 0
    shown = capsys.readouterr().out
    assert "a␛[31mb" in shown
    assert "\x1b" not in shown


def test_bars_are_as_long_as_their_values_and_negative_ones_go_left():
    plot = draw_bars("x", {"a": [2.0, None], "b": [-1.0, 0.5]}, ["one", "two"])
    lengths = [bar.width for bar in plot.bars]
    assert lengths[0] == pytest.approx(2 * lengths[2])
    assert lengths[1] == 0
    assert plot.bars[1].figure == "-"
    assert plot.bars[2].x + plot.bars[2].width == pytest.approx(plot.zero) == plot.bars[0].x


def test_the_text_is_at_most_100_columns_wide(diagnosed):
    lines = render(diagnosed[1]).splitlines()
    too_wide = [line for line in lines if len(line) > 100 and not line.startswith(("model", "rows"))]
    assert too_wide == []


# --- what is diagnosed -----------------------------------------------------------------------------------------------


def test_a_recipe_is_diagnosed_with_its_own_model_rows_and_loss(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "mce_weight": 0.5, "mce_solver": "taylor"}))
    assert main([str(recipe), "--positions", "50", "--out", str(tmp_path / "out"), "--mce_order", "3"]) == 0
    figures = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert figures["loss"]["all"]["all"]["ce"] == pytest.approx(math.log(figures["model"]["vocabulary"]), rel=0.05)
    assert (figures["settings"]["mce_weight_shown"], figures["settings"]["solver"]["order"]) == (0.5, 3)
    assert figures["rows"]["positions"] == 50
    assert "predicts nothing yet" in capsys.readouterr().out


def test_a_recipes_token_loss_is_shown_with_its_settings_and_its_mce(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    own = {"token_loss": "threshold", "token_loss_settings": {"at": 0.003, "base": "logp"}, "mce_weight": 0.5}
    recipe.write_text(yaml.safe_dump({**TINY, **own}))
    assert main([str(recipe), "--positions", "50", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())["token_losses"]
    names = [each["name"] for each in found["losses"]]
    assert names[-4:] == [alone := "threshold(at=0.003, base=logp)", "mce", "CE+0.5MCE", f"{alone}+0.5MCE"]
    assert found["losses"][-1]["settings"] == {"base": "logp", "side": "top", "at": 0.003}
    assert (found["losses"][-1]["mce_weight"], found["own"]) == (0.5, names[-1])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"A run with these settings trains {alone}+0.5MCE; MCE" in shown
    assert f"a run with these settings trains {alone}+0.5MCE" in shown
    assert "the run's, no MCE" in shown


def test_a_run_is_diagnosed_by_its_recipe_and_its_adapter_counts(tmp_path, folder, tiny_tokenizer, capsys):
    run = tmp_path / "run"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(run)
    tiny_tokenizer.save_pretrained(str(run))
    recipe = {"model_name_or_path": str(folder), "dataset": str(folder / "rows.jsonl"), "use_peft": True}
    recipe |= {"prompt_template": "plain", "use_cpu": True, "bf16": False, "mce_top_k": 8, "max_length": 64}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(run), "--out", str(run), "--positions", "100000"]) == 0
    figures = json.loads((run / "diagnosis.json").read_text())
    rows = read_rows(find_subject(str(run), None, []).recipe, lambda line: None).train
    total = count = 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            n = int((labels[:, 1:] != -100).sum())
            total, count = total + n * model.eval()(input_ids=ids, labels=labels).loss.item(), count + n
    assert figures["rows"]["positions"] == count
    assert figures["loss"]["all"]["all"]["ce"] == pytest.approx(total / count, rel=1e-4)
    assert figures["settings"]["solver"]["top_k"] == 8
    assert "head is frozen" in capsys.readouterr().out


def test_a_run_from_scratch_is_diagnosed_with_its_own_weights_and_tokenizer(tmp_path, tiny_llama, tiny_tokenizer):
    run = write_run(tmp_path)
    tiny_llama().save_pretrained(run)
    tiny_tokenizer.save_pretrained(str(run))
    assert main([str(run), "--out", str(run), "--positions", "64", "--prompt_template", "plain"]) == 0
    figures = json.loads((run / "diagnosis.json").read_text())
    assert figures["model"]["name"] == str(run)
    assert figures["model"]["hidden_width"] == 64  # that of the weights; the recipe's model_config says 32
    assert (figures["rows"]["dataset"], figures["rows"]["read"]) == ("builtin", 2000)


def test_a_runs_diagnosis_stands_on_its_card_once_it_is_in_its_folder(tmp_path, diagnosed):
    run = write_run(tmp_path)
    assert hub(["card", str(run)]) == 0
    assert "Diagnosis" not in (run / "README.md").read_text()
    shutil.copy(diagnosed[0] / "diagnosis.json", run)
    assert hub(["card", str(run)]) == 0
    card = (run / "README.md").read_text()
    whole = diagnosed[1]["loss"]["all"]["all"]
    assert f"| CE, MCE | {whole['ce']:.3f}, {whole['mce']['in use']:.3f} nats |" in card
    assert f"| {whole['positions']}, in {diagnosed[1]['rows']['rows_used']} rows |" in card
    assert all(line[:30] in card for line in diagnosed[1]["reading"])
    for each in diagnosed[1]["token_losses"]["losses"]:
        against = each["gradients"]["all"]["all"]["hidden"]
        row = f"{each['value']:.3f} | {against['cosine']:.3f} | {against['norm_ratio']:.3g} |"
        assert row in card.replace("\\", "")


def test_a_diagnosis_of_before_the_token_losses_still_stands_on_the_card(tmp_path, diagnosed):
    run = write_run(tmp_path)
    older = {key: value for key, value in diagnosed[1].items() if key != "token_losses"}
    (run / "diagnosis.json").write_text(json.dumps(older))
    assert hub(["card", str(run)]) == 0
    card = (run / "README.md").read_text()
    assert "Diagnosis" in card
    assert "| token loss |" not in card


def test_a_file_that_is_no_diagnosis_is_refused_for_the_card(tmp_path, capsys):
    run = write_run(tmp_path)
    (run / "diagnosis.json").write_text('{"format": "matrix_llm.diagnosis", "version": 2}')
    assert hub(["card", str(run)]) == 2
    assert "diagnosis.json" in capsys.readouterr().err


def test_token_losses_of_another_kind_are_refused_and_their_names_cannot_break_the_card(tmp_path, diagnosed, capsys):
    run = write_run(tmp_path)
    figures = json.loads(json.dumps(diagnosed[1]))
    figures["token_losses"]["losses"][0]["name"] = "a | b\n## <img src=x>"
    (run / "diagnosis.json").write_text(json.dumps(figures))
    assert hub(["card", str(run)]) == 0
    assert "\n| a \\| b ## \\<img src=x> | " in (run / "README.md").read_text()
    figures["token_losses"]["losses"][0]["value"] = "much"
    (run / "diagnosis.json").write_text(json.dumps(figures))
    assert hub(["card", str(run)]) == 2
    assert "diagnosis.json" in capsys.readouterr().err


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(("words", "said"), [
    (["{folder}"], "ROWS"),
    (["{folder}", "{folder}/nowhere.jsonl"], "nowhere.jsonl"),
    (["{folder}", "{rows}", "--dataset", "builtin"], "dataset='builtin'"),
    (["{folder}", "{rows}", "--model_name_or_path", "x"], "model_name_or_path='x'"),
    (["{folder}", "{rows}", "--mce_stepps", "3"], "mce_steps"),
    (["{folder}", "{rows}", "--max_length", "4"], "max_length"),
    (["{folder}/nowhere", "{rows}"], "nowhere"),
    (["no_such_recipe"], "no_such_recipe"),
    (["{folder}/r.yaml", "{rows}"], "--dataset"),
    (["{folder}", "{rows}", "--out", "{rows}"], "--out='{rows}' is a file"),
    (["{folder}", "{rows}", "--output_dir", "{rows}"], "Give a folder"),
    (["{folder}/nowhere", "{rows}", "--out", "{rows}/a/b"], "--out='{rows}/a/b' is inside '{rows}'"),
    (["{folder}/nowhere", "{rows}", "--out", "/proc/out"], "--out='/proc/out' cannot be written"),
])  # fmt: skip
def test_what_cannot_be_measured_is_one_line(folder, capsys, words, said):
    names = {"folder": str(folder), "rows": str(folder / "rows.jsonl")}
    assert said.format(**names) in refused(capsys, *(word.format(**names) for word in words), *OPTIONS)


def test_more_positions_than_memory_holds_are_refused_with_the_number_that_fits(folder, monkeypatch, capsys):
    check_memory(1000, 50_000, 10**9)
    with pytest.raises(RecipeError, match=r"--positions.* 2,000 .*1.6 GB.*1.0 GB.*at most 1,250"):
        check_memory(2000, 50_000, 10**9)
    monkeypatch.setattr(diagnosis, "_free_memory", lambda device: 100_000)
    assert "at most 20" in refused(capsys, folder, folder / "rows.jsonl", *OPTIONS)


@pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_a_recipe_for_a_gpu_is_diagnosed_with_another_attention_and_says_so(folder, attention):
    words = [*OPTIONS, "--attn_implementation", attention]
    subject = find_subject(str(folder), str(folder / "rows.jsonl"), words)
    assert any(attention in line for line in not_applied(subject.recipe))
    model = read_model(subject, read_rows(subject.recipe, lambda line: None).tokenizer)
    assert model.config._attn_implementation in ("eager", "sdpa")


def test_a_loss_that_needs_a_teacher_is_said_not_to_be_shown(folder):
    words = [*OPTIONS, "--token_loss", "kd", "--teacher_model_name_or_path", str(folder)]
    said = not_applied(find_subject(str(folder), str(folder / "rows.jsonl"), words).recipe)
    assert any("token_loss=kd" in line for line in said)
    assert any(f"teacher_model_name_or_path={folder}" in line for line in said)
    assert not any("token_loss" in line for line in not_applied(find_subject(str(folder), "builtin", OPTIONS).recipe))


def test_rows_that_are_not_trained_on_are_refused(folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({**ROWS[0], "weight": 0}))
    assert "weight 0" in refused(capsys, folder, rows, *OPTIONS)


def test_a_model_that_is_not_a_causal_language_model_with_a_linear_head_is_refused(tmp_path, tiny_tokenizer, capsys):
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(str(tmp_path / "bert"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    assert "Bert" in refused(capsys, tmp_path / "bert", rows, *OPTIONS)


def test_broken_weights_are_refused_by_name(folder, tmp_path, tiny_tokenizer, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "up_proj" in refused(capsys, tmp_path, folder / "rows.jsonl", *OPTIONS)


def test_a_tokenizer_with_tokens_beyond_the_model_is_refused(folder, tmp_path, tiny_tokenizer, capsys):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    tokens = json.loads(file.read_text())
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": 300, "content": "<extra>"})
    file.write_text(json.dumps(tokens))
    assert "<extra>" in refused(capsys, tmp_path, folder / "rows.jsonl", *OPTIONS)


def test_a_target_whose_loss_is_not_finite_is_named(tmp_path, tiny_tokenizer, capsys):
    model = tiny_model("phi", vocab_size=300, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    equals = tiny_tokenizer.encode(" =", add_special_tokens=False)[0]
    model.lm_head.weight.data[equals] = 3e38  # finite, but not what it is multiplied with
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    assert "where the target is" in refused(capsys, tmp_path, rows, *OPTIONS)


def test_centred_vectors_in_use_stand_beside_the_heads_own(folder, tmp_path, diagnosed):
    words = [str(folder), str(folder / "rows.jsonl"), *OPTIONS, "--positions", "100000", "--out", str(tmp_path)]
    assert main([*words, "--mce_embeddings", "centred"]) == 0
    figures = json.loads((tmp_path / "diagnosis.json").read_text())
    for part in ("head", "forgiven", "gradients"):
        assert list(figures[part]) == ["in use", "lm_head"]
    plain, centred = diagnosed[1], figures
    for mine, theirs in (("in use", "centred"), ("lm_head", "in use")):
        found = centred["gradients"][mine]["all"]["all"]["mce"]["hidden"]
        wanted = plain["gradients"][theirs]["all"]["all"]["mce"]["hidden"]
        assert found == pytest.approx(wanted, rel=1e-4)
    emo, plain_emo = (
        next(each for each in of["token_losses"]["losses"] if each["name"] == "emo")["gradients"]["all"]["all"]
        for of in (centred, plain)
    )
    assert emo["hidden"] == plain_emo["hidden"]  # EMO does not centre its vectors


def test_a_stream_is_diagnosed_on_its_first_rows(folder, tmp_path):
    words = [str(folder), str(folder / "rows.jsonl"), *OPTIONS, "--out", str(tmp_path), "--positions", "20"]
    assert main([*words, "--streaming", "--max_steps", "1"]) == 0
    assert json.loads((tmp_path / "diagnosis.json").read_text())["rows"]["rows_used"] == 32
