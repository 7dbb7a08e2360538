"""Fine-tune a causal LM with CE + MCE from one recipe.

    accelerate launch matrix_llm/train.py recipes/tiny.yaml [--key value ...]
    python matrix_llm/train.py recipes/llemma7b.yaml --dry_run

1. the recipe, its overrides and the output directory are checked; nothing has been loaded yet (run/command.py)
2. the model's configuration; rows, tokenizer, label masks; what was dropped is printed
3. --dry_run prints the plan and stops
4. the model, the trainer, greedy accuracy before (by another engine than training's: at the first step)
5. training; metrics.jsonl grows as it goes
6. weights, tokenizer, recipe.yaml, results.json, loss.png and README.md (the card) are moved into place
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository; this folder's ssl/ would hide the standard one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "__main__":
    from matrix_llm.base.threads import wait_passively

    wait_passively()  # before torch is imported

import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import yaml

from matrix_llm.base.console import say
from matrix_llm.base.errors import RecipeError
from matrix_llm.base.files import parse_json, read_jsonl, write_text
from matrix_llm.base.text import quoted_lines
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
    finish_run_folder,
    move_into_place,
    say_stopped,
    start_run_folder,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

    from matrix_llm.run.engine_accuracy import EngineAccuracy
    from matrix_llm.run.preemption import StopOnSignal
    from matrix_llm.run.prepare import Prepared
    from matrix_llm.trainer import MatrixTrainer

USAGE = "usage: accelerate launch matrix_llm/train.py RECIPE.yaml [--key value ...] [--dry_run]"
OWN = "transformers"  # the accuracy_engine that answers in this process
GATHER = "stage3_gather_16bit_weights_on_model_save"


# --- --dry_run -------------------------------------------------------------------------------------------------------


def print_plan(recipe: Recipe) -> None:
    """Print rows and their lengths, the resolved recipe, the loss, steps, memory per GPU, and one row with its mask."""
    from matrix_llm.model.adapter_checks import check_adapters
    from matrix_llm.model.early_checks import check_model
    from matrix_llm.model.load import load_config
    from matrix_llm.model.pretrained import read_config
    from matrix_llm.plan.memory import memory_lines
    from matrix_llm.plan.steps import describe_loss, masked_sample, plan_steps
    from matrix_llm.run.prepare import limit_max_length, prepare_data

    # 1. What a run would be refused for; then rows and tokenizer, no weights
    read = read_config(recipe)
    check_model(recipe, read)
    check_adapters(recipe.model, trust_remote_code=recipe.training.trust_remote_code, read=read)
    if recipe.missing:
        say(f"=> a run on this machine would be refused: {recipe.missing}")
    training, processes = recipe.training, int(os.environ.get("WORLD_SIZE", "1"))
    limit_max_length(recipe, say=say, read=read)
    prepared = prepare_data(recipe, say=say, dry_run=True, read=read)
    config = load_config(recipe.model, prepared.tokenizer, trust_remote_code=training.trust_remote_code, read=read)
    longest = max(prepared.report.longest, 1)
    length = min(training.max_length or longest, longest)
    if training.packing and training.max_length:
        length = training.max_length  # packs are as long as they may be, however short the rows

    # 2. The plan
    for report in (prepared.report, prepared.held_out_report):
        say("\n".join(report.lines()) if report else "no held-out rows")
    say(f"\n# {recipe.path}, resolved\n{yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)}")
    say(f"# loss\n{describe_loss(training, config)}\n")
    say("# steps\n" + "\n".join(plan_steps(recipe, prepared.report, processes).lines()))
    say(f"(for WORLD_SIZE={processes}; set it to plan for more processes)\n")
    say(f"# memory per GPU, estimated, for rows of {length} tokens")
    say("\n".join(memory_lines(recipe, config, length, processes)) + "\n")
    sample = masked_sample(next(iter(prepared.train)), prepared.tokenizer)
    say("# the first row and its label mask\n" + "\n".join(sample))


# --- the run ---------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, stop: "StopOnSignal", arguments: list[str]) -> None:
    """A complete run. One that `stop` ends early saves a checkpoint and prints how to resume."""
    from matrix_llm.model.adapter_checks import check_adapters
    from matrix_llm.model.early_checks import check_model
    from matrix_llm.model.pretrained import read_config
    from matrix_llm.run.engine_accuracy import check_engine
    from matrix_llm.run.inputs import INPUTS, check_inputs, inputs_of
    from matrix_llm.run.preemption import resume_command
    from matrix_llm.run.prepare import limit_max_length, prepare_data
    from matrix_llm.run.rehearsal import describe_space

    training, output = recipe.training, Path(str(recipe.training.output_dir))
    started = time.perf_counter()

    # 1. What the model's configuration tells. A resumed run must read the rows it was started with.
    read = read_config(recipe)
    check_model(recipe, read)
    check_adapters(recipe.model, trust_remote_code=training.trust_remote_code, read=read)
    check_engine(recipe.data.accuracy_engine)
    resume = find_resume_checkpoint(training)
    with training.main_process_first(desc="comparing the rows with those of the run"):
        inputs = inputs_of(recipe)
        if resume:
            check_inputs(Path(resume), inputs)

    # 2. Rows, then model and trainer
    limit_max_length(recipe, say=say, read=read)
    prepared = prepare_data(recipe, say=say, read=read)
    check_launch(recipe, prepared)
    trainer = make_trainer(recipe, prepared, read)
    trainer.rehearse_saving()
    if (warning := describe_space(trainer.model, training)) is not None:
        say(f"=> {warning}")
    report = prepared.report
    results: dict[str, Any] = {"train_rows": report.rows_kept, "data": asdict(report), "processes": training.world_size}
    results[INPUTS] = inputs

    # 3. Greedy accuracy before training
    results |= measure_before(trainer, recipe, prepared, resume)
    if trainer.is_world_process_zero():
        start_run_folder(output, recipe.resolved, results)
    if resume:
        results["resumed_from"] = Path(resume).name

    # 4. Training
    clock = time.perf_counter()
    with measuring_by_engine(trainer, recipe, prepared, stop) as measured:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=resume)
        if stop.stopped:
            say_stopped(trainer.state, output, resume_command(arguments, stop.launcher))
            trainer.accelerator.wait_for_everyone()
            return
        results |= {"train_seconds": round(time.perf_counter() - clock, 1), "steps": trainer.state.global_step}

        # 5. Accuracy after training, and the files of the run
        if prepared.held_out is not None:
            results["evaluation"] = trainer.evaluate()
        results |= measured.before_and_after() if measured else measure_accuracy_of(trainer, recipe, prepared, "after")
    save_run(trainer, recipe, results, started)


def measure_before(
    trainer: "MatrixTrainer", recipe: Recipe, prepared: "Prepared", resume: str | None
) -> dict[str, Any]:
    """Greedy accuracy before training. A resumed run cannot measure it again, and takes it from the first start.

    Another engine than training's measures it later, when all processes can save the weights.
    """
    earlier = Path(str(recipe.training.output_dir)) / PARTIAL
    if resume and earlier.is_file():
        return read_results(earlier)
    return measure_accuracy_of(trainer, recipe, prepared, "before") if recipe.data.accuracy_engine == OWN else {}


@contextmanager
def measuring_by_engine(
    trainer: "MatrixTrainer", recipe: Recipe, prepared: "Prepared", stop: "StopOnSignal"
) -> "Iterator[EngineAccuracy | None]":
    """Have accuracy measured during the block by the recipe's accuracy_engine; None if that is training's own.

    Whatever ends the block, the engine ends with it.
    """
    from matrix_llm.run.engine_accuracy import FOLDER, EngineAccuracy
    from matrix_llm.run.scoring import Scoring

    data, training = recipe.data, recipe.training
    if data.accuracy_engine == OWN or not prepared.problems:
        yield None
        return
    settings = decoding_settings(recipe)
    scoring = Scoring(
        folder=Path(str(training.output_dir)) / FOLDER,
        engine=data.accuracy_engine,
        template=settings["template"],
        max_new_tokens=settings["max_new_tokens"],
        gpu_memory=data.accuracy_gpu_memory,
        trust_remote_code=training.trust_remote_code,
        device=training.device,
    )
    measured = EngineAccuracy(trainer, prepared.problems, scoring, every=data.accuracy_steps, stop=stop)
    trainer.add_callback(measured)
    try:
        yield measured
    finally:
        measured.close()


def read_results(path: Path) -> dict[str, Any]:
    """The results so far of an interrupted run.

    Raises:
        RecipeError: the file is damaged.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RecipeError(f"{path} is not a JSON object. Restore the file, or start a new run in another output_dir.")
    return found


def check_launch(recipe: Recipe, prepared: "Prepared") -> None:
    """Refuse what this kind of launch cannot do, before the weights are loaded.

    Raises:
        RecipeError: greedy decoding under sharded weights; or a ZeRO-3 run that could not save its weights.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    training = recipe.training
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or bool(training.fsdp)
    is_here = prepared.problems and recipe.data.accuracy_engine == OWN
    if is_here and (is_fsdp or is_deepspeed_zero3_enabled()):
        raise RecipeError(
            f"accuracy_rows={recipe.data.accuracy_rows} decodes with the full weights, which ZeRO-3 and FSDP shard. "
            "Set accuracy_engine: vllm, or accuracy_rows: 0 and evaluate the finished checkpoint."
        )
    plugin = training.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and not plugin.deepspeed_config["zero_optimization"].get(GATHER):
        raise RecipeError(
            f"the DeepSpeed config shards weights (stage 3) without {GATHER}: the run could not save them. "
            "Set it to true."
        )


def make_trainer(recipe: Recipe, prepared: "Prepared", read: "PretrainedConfig | None" = None) -> "MatrixTrainer":
    """Create the model and the trainer, with a log line for each decision made on the way."""
    from matrix_llm.model.adapters import lora_config
    from matrix_llm.model.load import load_config, load_model
    from matrix_llm.plan.steps import describe_loss, plan_steps
    from matrix_llm.run.decode import AccuracyCallback
    from matrix_llm.run.metrics import MetricsFileCallback
    from matrix_llm.trainer import MatrixTrainer

    training, tokenizer = recipe.training, prepared.tokenizer
    training.dataset_kwargs = prepared.dataset_kwargs
    training.assistant_only_loss, training.chat_template_path = False, None  # done: TRL would do it to rows of text

    # 1. The plan
    for report in (prepared.report, prepared.held_out_report):
        say("\n".join(f"=> {line}" for line in report.lines()) if report else "=> no held-out rows")
    say("\n".join(f"=> {line}" for line in plan_steps(recipe, prepared.report, training.world_size).lines()))
    known: Any = {"trust_remote_code": training.trust_remote_code, "read": read}
    config = load_config(recipe.model, tokenizer, **known)
    say(f"=> loss             {describe_loss(training, config)}")

    # 2. The weights
    model = load_model(recipe.model, tokenizer, seed=training.seed, **known)
    name, parameters = type(model).__name__, model.num_parameters()
    say(f"=> model            {name}, {parameters:,} parameters, {training.world_size} process(es)")
    if recipe.model.use_peft and recipe.model.model_config is not None:
        say("=> adapters         on random weights, which are not saved: only this recipe and its seed give them again")

    # 3. The trainer
    trainer = MatrixTrainer(
        model,
        training,
        train_dataset=prepared.train,
        eval_dataset=prepared.held_out,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.model),
        callbacks=[MetricsFileCallback()],
    )
    trainer.stops_at_overflow = True  # whoever runs a recipe is promised that
    if recipe.data.accuracy_steps and recipe.data.accuracy_engine == OWN:
        every = recipe.data.accuracy_steps
        trainer.add_callback(AccuracyCallback(trainer, prepared.problems, every=every, **decoding_settings(recipe)))
    return trainer


def decoding_settings(recipe: Recipe) -> dict[str, Any]:
    """How the held-out problems are posed to the model: arguments of `measure_accuracy`."""
    from matrix_llm.data.prompts import resolve_template

    return {
        "template": resolve_template(recipe.data.prompt_template),  # "chat" stays "chat"
        "max_new_tokens": recipe.data.accuracy_max_new_tokens,
        "batch_size": recipe.training.per_device_eval_batch_size,
    }


def measure_accuracy_of(trainer: "MatrixTrainer", recipe: Recipe, prepared: "Prepared", when: str) -> dict[str, Any]:
    """{"accuracy_before": ...} or {"accuracy_after": ...}; empty without problems. Two responses are logged."""
    from matrix_llm.run.decode import measure_accuracy

    if not prepared.problems:
        return {}
    found = measure_accuracy(trainer.model, prepared.tokenizer, prepared.problems, **decoding_settings(recipe))
    say(
        f"=> accuracy {when} training: {100 * found.accuracy:.1f} % of {found.total} held-out problems, greedy "
        f"(95 % interval {100 * found.low:.1f} to {100 * found.high:.1f})"
    )
    for problem, response in zip(prepared.problems[:2], found.responses[:2], strict=False):
        asked, answered, gold = map(quoted_lines, (problem.query, response, problem.answer))
        say(f"   Q: {asked}\n   A:{answered}\n   gold: {gold}")
    figures = {key: value for key, value in asdict(found).items() if key not in ("responses", "is_correct")}
    return {f"accuracy_{when}": figures}


def save_run(trainer: "MatrixTrainer", recipe: Recipe, results: dict[str, Any], started: float) -> None:
    """Save weights and tokenizer, then results, plot and card. A collective: every process must call it."""
    from matrix_llm.publish.card import model_card, versions
    from matrix_llm.run.metrics import plot_losses

    # 1. The weights, complete in a temporary folder before they are moved into place
    output = Path(str(recipe.training.output_dir))
    staging = output / STAGING
    if trainer.is_world_process_zero():
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # accelerate's default for FSDP2 is sharded, and Trainer then writes nothing here
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(staging), _internal_call=True)
    trainer.accelerator.wait_for_everyone()

    # 2. The files that describe them. PARTIAL is removed last: while it exists, the run counts as unfinished.
    if trainer.is_world_process_zero():
        move_into_place(staging, output)
        results |= {"total_seconds": round(time.perf_counter() - started, 1), "versions": versions()}
        entries = read_jsonl(output / METRICS)
        plot_losses(entries, output / PLOT, title=output.name)
        write_text(output / RESULTS, json.dumps(results, indent=2) + "\n")
        write_text(output / CARD, str(model_card(recipe, entries, results)))
        finish_run_folder(output)
        say(f"=> {output}/ holds the weights, tokenizer, recipe.yaml, {METRICS}, {RESULTS}, {PLOT} and {CARD}")
    trainer.accelerator.wait_for_everyone()  # no rank leaves while another still needs it


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Train, or print the plan, as the arguments say. Returns the exit status (matrix_llm/run/command.py)."""
    command = Command(
        usage=USAGE,
        load_recipe=load_recipe,
        find_destination=find_destination,
        remove_push_settings=remove_push_settings,
        print_plan=print_plan,
        train=train,
        push=push,
    )
    return run_command(command, arguments)


if __name__ == "__main__":
    exit_process(main())
