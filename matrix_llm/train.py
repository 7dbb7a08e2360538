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

if (
    not __package__
):  # run as a script: import from the repository, not from this folder, whose ssl/ hides the standard one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    from matrix_llm.base.threads import wait_passively

    wait_passively()  # before torch is imported

import json
import os
import shutil
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import yaml

from matrix_llm.base.console import say
from matrix_llm.base.errors import RecipeError
from matrix_llm.base.files import write_text
from matrix_llm.config import Recipe, load_recipe
from matrix_llm.publish.destination import find_destination, remove_push_settings
from matrix_llm.publish.push import push
from matrix_llm.run.command import Command, exit_process, run_command
from matrix_llm.run.run_folder import (
    CARD,
    METRICS,
    PARTIAL,
    PLOT,
    RESULTS,
    STAGING,
    find_resume_checkpoint,
    move_into_place,
    say_stopped,
    start_run_folder,
)

if TYPE_CHECKING:
    from matrix_llm.run.preemption import StopOnSignal

USAGE = "usage: accelerate launch matrix_llm/train.py RECIPE.yaml [--key value ...] [--dry_run]"


GATHER = "stage3_gather_16bit_weights_on_model_save"


def print_plan(recipe: Recipe, tokenizer, dataset, report) -> None:
    """What --dry_run shows: the recipe as resolved, the step arithmetic, memory per GPU, one row with its mask."""
    from matrix_llm.model.load import load_config
    from matrix_llm.plan.memory import memory_lines
    from matrix_llm.plan.steps import describe_loss, masked_sample, plan_steps

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
    say("\n".join(memory_lines(recipe, config, length, processes)) + "\n")
    say("# the first row and its label mask\n" + "\n".join(masked_sample(next(iter(dataset)), tokenizer)))


def print_dry_run(recipe: Recipe) -> None:
    """Steps 2 and 3 of the module's list."""
    from matrix_llm.run.prepare import prepare_data

    tokenizer, (dataset, report), held_out = prepare_data(recipe, say=say, dry_run=True)
    for part in (report, held_out[1] if held_out else None):
        say("\n".join(part.lines()) if part else "no held-out rows")
    say("")
    print_plan(recipe, tokenizer, dataset, report)


def train(recipe: Recipe, stop: "StopOnSignal", arguments: list[str]) -> None:
    """Steps 4 to 6 of the module's list. A run that `stop` ends early leaves a checkpoint and prints how to go on."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from matrix_llm.base.files import read_jsonl
    from matrix_llm.data.prompts import resolve_template
    from matrix_llm.model.adapters import lora_config
    from matrix_llm.model.load import load_config, load_model
    from matrix_llm.plan.steps import describe_loss, plan_steps
    from matrix_llm.publish.card import model_card, versions
    from matrix_llm.run.decode import AccuracyCallback, measure_accuracy
    from matrix_llm.run.metrics import MetricsFileCallback, plot_losses
    from matrix_llm.run.preemption import resume_command
    from matrix_llm.run.prepare import prepare_data
    from matrix_llm.trainer import MatrixTrainer

    training = recipe.training
    started = time.perf_counter()
    prepared = prepare_data(recipe, say=say)
    tokenizer, report, problems = prepared.tokenizer, prepared.report, prepared.problems
    training.dataset_kwargs = prepared.dataset_kwargs
    if problems and (
        is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or training.fsdp
    ):
        raise RecipeError(
            f"accuracy_rows={recipe.data.accuracy_rows} decodes with whole weights, which ZeRO-3 and FSDP shard. "
            "Set accuracy_rows: 0 and evaluate the finished checkpoint."
        )
    plugin = training.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and not plugin.deepspeed_config["zero_optimization"].get(GATHER):
        raise RecipeError(
            f"the DeepSpeed config shards weights (stage 3) without {GATHER}: the run could not save them. Set it to true."
        )
    output = Path(str(training.output_dir))
    for part in (report, prepared.held_out_report):
        say("\n".join(f"=> {line}" for line in part.lines()) if part else "=> no held-out rows")
    say("\n".join(f"=> {line}" for line in plan_steps(recipe, report, training.world_size).lines()))

    config = load_config(recipe.model, tokenizer, trust_remote_code=training.trust_remote_code)
    say(f"=> loss             {describe_loss(training, config)}")
    model = load_model(recipe.model, tokenizer, seed=training.seed, trust_remote_code=training.trust_remote_code)
    say(
        f"=> model            {type(model).__name__}, {model.num_parameters():,} parameters, {training.world_size} process(es)"
    )
    trainer = MatrixTrainer(
        model,
        training,
        train_dataset=prepared.train,
        eval_dataset=prepared.held_out,
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

    resume = find_resume_checkpoint(training)
    earlier = output / PARTIAL
    if resume and earlier.is_file():
        results |= json.loads(earlier.read_text(encoding="utf-8"))  # accuracy before training cannot be measured again
    else:
        measure("before")
    if trainer.is_world_process_zero():
        start_run_folder(output, recipe.resolved, results)

    clock = time.perf_counter()
    trainer.add_callback(stop)
    if resume:
        results["resumed_from"] = Path(resume).name
    trainer.train(resume_from_checkpoint=resume)
    if stop.stopped:
        say_stopped(trainer.state, output, resume_command(arguments, stop.launcher))
        trainer.accelerator.wait_for_everyone()
        return
    results["train_seconds"] = round(time.perf_counter() - clock, 1)
    results["steps"] = trainer.state.global_step
    if prepared.held_out:
        results["evaluation"] = trainer.evaluate()
    measure("after")

    staging = output / STAGING
    if trainer.is_world_process_zero():
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # accelerate's default for FSDP2 is sharded, and Trainer then writes nothing here
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(staging), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        move_into_place(staging, output)
        results["total_seconds"] = round(time.perf_counter() - started, 1)
        results["versions"] = versions()
        entries = read_jsonl(output / METRICS)
        plot_losses(entries, output / PLOT, title=output.name)
        write_text(output / RESULTS, json.dumps(results, indent=2) + "\n")
        write_text(output / CARD, str(model_card(recipe, entries, results)))
        earlier.unlink(missing_ok=True)
        say(f"=> {output}/ holds the weights, tokenizer, recipe.yaml, {METRICS}, results.json, {PLOT} and README.md")
    trainer.accelerator.wait_for_everyone()  # no rank leaves while another still needs it


def main(arguments: list[str] | None = None) -> int:
    """Train, or print the plan, as the arguments say. Returns the exit status (matrix_llm/run/command.py)."""
    command = Command(
        usage=USAGE,
        load_recipe=load_recipe,
        find_destination=find_destination,
        remove_push_settings=remove_push_settings,
        print_plan=print_dry_run,
        train=train,
        push=push,
    )
    return run_command(command, arguments)


if __name__ == "__main__":
    exit_process(main())
