"""Fine-tune a causal LM with CE + MCE from one recipe.

    accelerate launch matrix_llm/train.py recipes/tiny.yaml [--key value ...]
    python matrix_llm/train.py recipes/llemma7b.yaml --dry_run

1. the recipe, its overrides and the output directory are checked; nothing has been loaded yet
2. rows, tokenizer, label masks; what was dropped is printed
3. --dry_run prints the plan and stops
4. the model, the trainer, greedy accuracy before
5. training; metrics.jsonl grows as it goes
6. weights, tokenizer, recipe.yaml, results.json, loss.png and README.md (the card) are moved into place
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder, whose ssl/ would hide the standard one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from matrix_llm.config import Recipe, RecipeError, load_recipe
from matrix_llm.data import DataError, build_dataset, load_rows, row_texts
from matrix_llm.files import write_text

USAGE = "usage: accelerate launch matrix_llm/train.py RECIPE.yaml [--key value ...] [--dry_run]"

# Settings that may change between a run and its resumption: they say when to look, not what is computed.
MAY_CHANGE = {
    "resume_from_checkpoint", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "eval_steps", "eval_strategy",
    "report_to", "run_name", "disable_tqdm", "effective_rank_steps", "accuracy_rows", "accuracy_steps",
    "dataloader_num_workers", "dataset_num_proc",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo",
}  # fmt: skip


@dataclass(frozen=True)
class HeldOutProblem:
    """A question with a final answer to compare with."""

    query: str
    answer: str


PARTIAL = "results.partial.json"
GATHER = "stage3_gather_16bit_weights_on_model_save"


def _from_last(value: str | bool | None) -> bool:
    return value is True or (isinstance(value, str) and value.lower() in ("true", "1", "yes"))


def say(text: str) -> None:
    """Print on the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def check_output_dir(recipe: Recipe) -> None:
    """Refuse to write over an earlier run, and to resume with settings that would make a different model.

    Raises:
        RecipeError: the directory holds a finished or interrupted run and resume was not asked for; it is no directory or
            cannot be written; or a setting differs from the one the checkpoint was made with.
    """
    output = Path(str(recipe.training.output_dir))
    resume = recipe.training.resume_from_checkpoint
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output_dir={str(output)!r} is a file. Choose another output_dir.")
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise RecipeError(f"output_dir={str(output)!r} cannot be written: {parent} is read-only. Choose another output_dir.")
    from matrix_llm.trainer import last_complete_checkpoint

    last = last_complete_checkpoint(output)
    if [*output.glob("*.safetensors")]:
        raise RecipeError(f"output_dir={str(output)!r} holds the weights of a finished run. Choose another output_dir, or remove it.")
    if not resume:
        if last is not None:
            raise RecipeError(
                f"output_dir={str(output)!r} holds {last.name} of an earlier run. "
                "Add --resume_from_checkpoint true to go on with it, or choose another output_dir."
            )
        return
    if not _from_last(resume) and not Path(str(resume)).is_dir():
        raise RecipeError(f"resume_from_checkpoint={resume!r}: no such folder. Give true (the last checkpoint) or a checkpoint's path.")
    if last is None and _from_last(resume):
        say(f"=> no whole checkpoint in {output}, so the run starts from the beginning")
        return
    partial = output / PARTIAL
    before_processes = json.loads(partial.read_text(encoding="utf-8")).get("processes") if partial.is_file() else None
    if before_processes not in (None, recipe.training.world_size):
        raise RecipeError(
            f"cannot resume {str(output)!r} with {recipe.training.world_size} processes: it was started with {before_processes}, and "
            "the effective batch would change. Launch as many, or start anew in another output_dir."
        )
    stored = output / "recipe.yaml"
    if not stored.is_file():
        return
    before: dict[str, Any] = yaml.safe_load(stored.read_text(encoding="utf-8")) or {}
    changed = [
        f"{key}: {before.get(key, 'not given')!r} then, {recipe.resolved.get(key, 'not given')!r} now"
        for key in sorted({*before, *recipe.resolved} - MAY_CHANGE)
        if before.get(key) != recipe.resolved.get(key)
    ]
    if changed:
        raise RecipeError(
            f"cannot resume {str(output)!r} with other settings than it was started with ({'; '.join(changed)}). "
            "Restore them, or start anew in another output_dir."
        )


def held_out_problems(recipe: Recipe) -> list[HeldOutProblem]:
    """The problems that greedy accuracy is measured on: the first accuracy_rows held-out rows with a final answer."""
    from matrix_llm.accuracy import final_answer

    data, wanted = recipe.data, recipe.data.accuracy_rows
    source = str(data.eval_dataset or data.dataset)
    rows = load_rows(
        source, config=data.dataset_config, split=data.eval_split, max_rows=wanted, builtin_rows=wanted, seed=recipe.training.seed
    )
    problems = []
    for row in rows:
        query = row.get("query", row.get("question"))
        answer = final_answer(row_texts(row, data.prompt_template)[1]) if query else None
        if answer is not None:
            problems.append(HeldOutProblem(query, answer))
    if not problems:
        raise RecipeError(
            f"accuracy_rows={wanted}, but no row of {source!r} has a question and a final answer ('The answer is: 7' or '#### 7'). "
            "Set accuracy_rows: 0."
        )
    return problems


def prepare_data(recipe: Recipe):
    """Tokenizer, training set and held-out set (or None), each with its report."""
    from matrix_llm.model import load_tokenizer

    data, training = recipe.data, recipe.training
    rows = load_rows(
        str(data.dataset), config=data.dataset_config, split=data.dataset_split, max_rows=data.max_train_rows,
        builtin_rows=data.builtin_rows, seed=training.seed,
    )  # fmt: skip
    texts = ("".join(row_texts(row, data.prompt_template)) for row in rows) if recipe.model.tokenizer_vocab_size else None
    tokenizer = load_tokenizer(
        recipe.model, texts=texts, trust_remote_code=training.trust_remote_code, chat_template_path=training.chat_template_path
    )

    def build(rows, name):
        return build_dataset(
            rows, tokenizer, prompt_template=data.prompt_template, max_length=training.max_length, too_long=data.too_long,
            name=name, num_proc=training.dataset_num_proc,
        )  # fmt: skip

    train = build(rows, "train")
    held_out = None
    if data.eval_dataset is not None:
        eval_rows = load_rows(
            data.eval_dataset, config=data.dataset_config, split=data.eval_split, max_rows=data.max_eval_rows,
            builtin_rows=data.builtin_eval_rows, seed=training.seed,
        )  # fmt: skip
        held_out = build(eval_rows, "held out")
    return tokenizer, train, held_out


def print_plan(recipe: Recipe, tokenizer, dataset, report) -> None:
    """What --dry_run shows: the recipe as resolved, the step arithmetic, memory per GPU, one row with its mask."""
    from matrix_llm.model import load_config
    from matrix_llm.plan import describe_loss, masked_sample, plan_memory, plan_steps

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = load_config(recipe.model, tokenizer, trust_remote_code=recipe.training.trust_remote_code)
    steps = plan_steps(recipe, report, processes)
    length = min(recipe.training.max_length or report.longest, max(report.longest, 1))
    if recipe.training.packing and recipe.training.max_length:
        length = recipe.training.max_length
    say(f"# {recipe.path}, resolved\n{yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)}")
    say(f"# loss\n{describe_loss(recipe.training, config)}\n")
    say("# steps\n" + "\n".join(steps.lines()))
    say(f"(for WORLD_SIZE={processes}; set it to plan for more processes)\n")
    say(f"# memory per GPU, estimated, for rows of {length} tokens")
    say("\n".join(plan.line() for plan in plan_memory(recipe, config, length, processes)) + "\n")
    say("# the first row and its label mask\n" + "\n".join(masked_sample(dataset[0], tokenizer)))


def train(recipe: Recipe) -> None:
    """Steps 4 to 6 of the module's list."""
    from huggingface_hub import HfApi
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from matrix_llm.accuracy import AccuracyCallback, measure_accuracy
    from matrix_llm.hub import model_card, versions
    from matrix_llm.model import load_config, load_model, lora_config
    from matrix_llm.plan import describe_loss, plan_steps
    from matrix_llm.prompts import resolve_template
    from matrix_llm.report import METRICS, PLOT, MetricsFileCallback, plot_losses, read_metrics
    from matrix_llm.trainer import MatrixTrainer, last_complete_checkpoint

    training = recipe.training
    started = time.perf_counter()
    tokenizer, (dataset, report), held_out = prepare_data(recipe)
    problems = held_out_problems(recipe) if recipe.data.accuracy_rows else []
    if problems and (is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or training.fsdp):
        raise RecipeError(
            f"accuracy_rows={recipe.data.accuracy_rows} decodes with whole weights, which ZeRO-3 and FSDP shard. "
            "Set accuracy_rows: 0 and evaluate the finished checkpoint."
        )
    plugin = training.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and not plugin.deepspeed_config["zero_optimization"].get(GATHER):
        raise RecipeError(f"the DeepSpeed config shards weights (stage 3) without {GATHER}: the run could not save them. Set it to true.")
    output = Path(str(training.output_dir))
    for part in (report, held_out[1] if held_out else None):
        say("\n".join(f"=> {line}" for line in part.lines()) if part else "=> no held-out rows")
    say("\n".join(f"=> {line}" for line in plan_steps(recipe, report, training.world_size).lines()))

    config = load_config(recipe.model, tokenizer, trust_remote_code=training.trust_remote_code)
    say(f"=> loss             {describe_loss(training, config)}")
    model = load_model(recipe.model, tokenizer, seed=training.seed, trust_remote_code=training.trust_remote_code)
    say(f"=> model            {type(model).__name__}, {model.num_parameters():,} parameters, {training.world_size} process(es)")
    trainer = MatrixTrainer(
        model,
        training,
        train_dataset=dataset,
        eval_dataset=held_out[0] if held_out else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.model),
        callbacks=[MetricsFileCallback()],
    )
    results: dict[str, Any] = {"train_rows": report.rows_kept, "data": asdict(report), "processes": training.world_size}

    decoding: dict[str, Any] = {
        "template": resolve_template(recipe.data.prompt_template),
        "max_new_tokens": recipe.data.accuracy_max_new_tokens,
        "batch_size": training.per_device_eval_batch_size,
    }
    if recipe.data.accuracy_steps:
        trainer.add_callback(AccuracyCallback(trainer, problems, every=recipe.data.accuracy_steps, **decoding))

    def measure(when: str) -> None:
        if not problems:
            return
        found = measure_accuracy(trainer.model, tokenizer, problems, **decoding)
        results[f"accuracy_{when}"] = {k: v for k, v in asdict(found).items() if k not in ("responses", "is_correct")}
        say(
            f"=> accuracy {when} training: {100 * found.accuracy:.1f} % of {found.total} held-out problems, greedy "
            f"(95 % interval {100 * found.low:.1f} to {100 * found.high:.1f})"
        )
        for problem, response in zip(problems[:2], found.responses[:2], strict=False):
            say(f"   Q: {problem.query}\n   A:{response}\n   gold: {problem.answer}")

    resume: str | None = str(training.resume_from_checkpoint) if training.resume_from_checkpoint else None
    if _from_last(resume):
        last = last_complete_checkpoint(output)
        resume = str(last) if last else None
    earlier = output / PARTIAL
    if resume and earlier.is_file():
        results |= json.loads(earlier.read_text(encoding="utf-8"))  # accuracy before training cannot be measured again
    else:
        measure("before")
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        recipe.resolved.pop("resume_from_checkpoint", None)  # how it was started, not what it is
        write_text(output / "recipe.yaml", yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True))
        write_text(earlier, json.dumps(results))

    clock = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    results["train_seconds"] = round(time.perf_counter() - clock, 1)
    results["steps"] = trainer.state.global_step
    if held_out:
        results["evaluation"] = trainer.evaluate()
    measure("after")

    staging = output / ".saving"
    if trainer.is_world_process_zero():
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # accelerate's default for FSDP2 is sharded, and Trainer then writes nothing here
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(staging), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for file in sorted(staging.iterdir()):
            os.replace(file, output / file.name)
        shutil.rmtree(staging)
        results["total_seconds"] = round(time.perf_counter() - started, 1)
        results["versions"] = versions()
        entries = read_metrics(output / METRICS)
        plot_losses(entries, output / PLOT, title=output.name)
        write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
        write_text(output / "README.md", str(model_card(recipe, entries, results)))
        earlier.unlink(missing_ok=True)
        say(f"=> {output}/ holds the weights, tokenizer, recipe.yaml, {METRICS}, results.json, {PLOT} and README.md")
        if training.push_to_hub:
            HfApi(token=training.hub_token).upload_folder(
                repo_id=str(trainer.hub_model_id), folder_path=output, ignore_patterns=["checkpoint-*", ".*"], commit_message="matrix_llm"
            )
    trainer.accelerator.wait_for_everyone()  # no rank leaves while another still needs it


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr where the recipe or the data cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    dry_run = any(a in ("--dry_run", "--dry-run") for a in arguments)
    arguments = [a for a in arguments if a not in ("--dry_run", "--dry-run")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    try:
        recipe = load_recipe(arguments[0], arguments[1:], dry_run=dry_run)
        if dry_run:
            tokenizer, (dataset, report), held_out = prepare_data(recipe)
            for part in (report, held_out[1] if held_out else None):
                say("\n".join(part.lines()) if part else "no held-out rows")
            say("")
            print_plan(recipe, tokenizer, dataset, report)
            return 0
        check_output_dir(recipe)
        from transformers import set_seed

        set_seed(recipe.training.seed)
        train(recipe)
    except (RecipeError, DataError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from matrix_llm.trainer import NonFiniteLossError

        if not isinstance(error, NonFiniteLossError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_as_script() -> None:
    """Exit with main's status. On several CPU processes, past the interpreter's shutdown, which gloo's threads sometimes abort
    ("terminate called without an active exception") after everything has been written."""
    status = main()
    if status == 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        if not torch.cuda.is_available():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    sys.exit(status)


if __name__ == "__main__":
    run_as_script()
