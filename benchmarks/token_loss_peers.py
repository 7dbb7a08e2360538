"""`token_loss` beside the code that its authors released: the largest difference in value and gradient, in float64.

    pip install ntloss==0.3.2 EMOLoss==0.0.3 liger-kernel==0.8.2
    python benchmarks/token_loss_peers.py --checkouts FOLDER

FOLDER holds checkouts under these names (those that are missing are left out, and so are packages that are not
installed; a checkout's own requirements are not needed):

    ASFT           github.com/zhuchichi56/ASFT                      6f6f51c
    Beyond         github.com/GaotangLi/Beyond-Log-Likelihood       220589d
    DFT            github.com/yongliang-wu/DFT                      e153181
    EMO            github.com/DRSY/EMO                              14da9d5
    GEM            github.com/liziniu/GEM                           e5b1430
    LLaMA-Factory  github.com/hiyouga/LLaMA-Factory                 ff6d4d1
    axolotl        github.com/axolotl-ai-cloud/axolotl              067b021

Only the functions, or the lines, that compute the loss are run, with `.float()` read as `.double()`. They give the mean
over the positions that count; ours is the sum of `token_loss` divided by their number. Each pair runs on 5, 64 and 64
positions over 33, 257 and 1,000 tokens, one of them ignored, in the last problem every second label likely.

Legend: N positions, V vocabulary, D embedding width.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import ast
import importlib.util
import textwrap
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.output import markdown_table
from matrix_llm.losses import token_loss

F64 = torch.float64
SIZES = [(5, 33, 0.0), (64, 257, 0.0), (64, 1000, 6.0)]  # positions, vocabulary, what is added to every second label
DIGITS = range(3, 13)  # the tokens that are 0 to 9


class Problem(NamedTuple):
    """Logits (N, V), labels (N,), token vectors (V, D) and a teacher's logits (N, V)."""

    logits: Tensor
    labels: Tensor
    embeddings: Tensor
    teacher: Tensor

    def shifted(self, of_tokens: Tensor) -> Tensor:
        """(1, N + 1, V): what a causal loss takes, whose last logits have no label."""
        return torch.cat([of_tokens, of_tokens[:1]])[None]

    @property
    def shifted_labels(self) -> Tensor:
        """(1, N + 1): the first label has no logits."""
        return torch.cat([self.labels[:1], self.labels])[None]


class Peer(NamedTuple):
    """One released loss and our name for it."""

    code: str
    theirs: Callable[[Problem], Tensor]  # a mean
    loss: str
    settings: dict[str, Any]
    mean_over: str = "counted"  # "counted", "numbers", "kept" or "sum"


def make_problem(positions: int, vocabulary: int, likely: float) -> Problem:
    g = torch.Generator().manual_seed(positions + vocabulary)
    logits = 3 * torch.randn(positions, vocabulary, dtype=F64, generator=g)
    labels = torch.randint(0, vocabulary, (positions,), generator=g)
    labels[0], labels[1], labels[3] = 5, -100, 12
    logits[torch.arange(0, positions, 2), labels[::2]] += likely
    embeddings = torch.randn(vocabulary, 16, dtype=F64, generator=g)
    return Problem(logits, labels, embeddings, 3 * torch.randn(positions, vocabulary, dtype=F64, generator=g))


# --------------------------------------------------------------------------------------------- running released code


def load_function(path: Path, name: str, *others: str) -> Callable[..., Any]:
    """A function of a source file, with the other functions of it that it calls."""
    source = path.read_text(encoding="utf-8")
    space: dict[str, Any] = {"torch": torch, "F": F, "IGNORE_INDEX": -100, "Optional": Optional}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name in (name, *others):
            code = textwrap.dedent(" " * node.col_offset + (ast.get_source_segment(source, node) or ""))
            exec(code.replace(".float()", ".double()"), space)
    return space[name]


def load_lines(path: Path, first: str, after: str, skip: int = 0, without: tuple[str, ...] = ()) -> str:
    """The lines from the one that contains `first`, of which `skip` others come before, up to and without the next that
    contains `after`; those that begin with one of `without` are left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = [i for i, line in enumerate(lines) if first in line][skip]
    end = next(i for i in range(start + 1, len(lines)) if after in lines[i])
    kept = [line for line in lines[start:end] if not line.strip().startswith(without or ("\0",))]
    return textwrap.dedent("\n".join(kept)).replace(".float()", ".double()")


class Output(dict):
    """A model's output: by key and by attribute."""

    __getattr__ = dict.__getitem__


def run_lines(code: str, **names: Any) -> dict[str, Any]:
    exec(code, space := {"torch": torch, "F": F, **names})
    return space


# ---------------------------------------------------------------------------------------------------------- the peers


def dft_and_beyond(folder: Path) -> Iterator[Peer]:
    def names(x: Problem) -> dict[str, Any]:
        loss_mask = (x.labels != -100).to(F64)
        labels = x.labels.clamp(min=0)
        cross_entropy = nn.CrossEntropyLoss(reduction="none")
        return {"shift_logits": x.logits, "shift_labels": labels, "loss_mask": loss_mask, "loss_fct": cross_entropy}

    def mean(found: dict[str, Any]) -> Tensor:
        return found["loss"].sum() / found["loss_mask"].sum()

    if (path := folder / "DFT/verl/verl/trainer/fsdp_dft_trainer.py").exists():
        code = load_lines(path, "loss = loss_fct(shift_logits, shift_labels)", "else:")
        yield Peer("DFT", lambda x: mean(run_lines(code, **names(x))), "dft", {})
    if (path := folder / "Beyond/main_verl/trainer/fsdp_sft_trainer.py").exists():
        first, after = 'if self.config.trainer.objective_trans == "original"', "IMPORTANT: We have a big assumption"
        beyond = textwrap.dedent(load_lines(path, first, after).rsplit("else:", 1)[0])

        def run(objective: str) -> Callable[[Problem], Tensor]:
            config = SimpleNamespace(trainer=SimpleNamespace(objective_trans=objective))
            return lambda x: mean(run_lines(beyond, self=SimpleNamespace(config=config), **names(x)))

        yield Peer("Beyond: p", run("p"), "minus_p", {})
        for alpha in (0.5, 1, 8, 10):
            yield Peer(f"Beyond: GeneralFamily-{alpha}", run(f"GeneralFamily-{alpha}"), "power", {"alpha": alpha})
        for name, base, side, at in [
            ("OnlyTopP", "p", "top", 0.01),
            ("OnlyBottomP", "p", "bottom", 0.1),
            ("OnlyTopLogP", "logp", "top", 0.01),
            ("OnlyBottomLogP", "logp", "bottom", 0.1),
        ]:
            settings = {"base": base, "side": side, "at": at}
            yield Peer(f"Beyond: {name}-{at}", run(f"{name}-{at}"), "threshold", settings, "kept")


def toolkits(folder: Path) -> Iterator[Peer]:
    if (path := folder / "LLaMA-Factory/src/llamafactory/train/trainer_utils.py").exists():
        dft = load_function(path, "dft_loss_func", "_dft_cross_entropy")
        eaft = load_function(path, "eaft_loss_func", "_eaft_cross_entropy")
        asft = load_function(path, "asft_loss_func", "_asft_cross_entropy", "_dft_cross_entropy", "_kl_divergence")
        code = "LLaMA-Factory"
        yield Peer(code, lambda x: dft(Output(logits=x.shifted(x.logits)), x.shifted_labels), "dft", {})
        for alpha in (0.5, 1.0, 2.0):
            yield Peer(
                code,
                lambda x, alpha=alpha: eaft(Output(logits=x.shifted(x.logits)), x.shifted_labels, alpha=alpha),
                "eaft",
                {"alpha": alpha},
            )
        yield Peer(
            code,
            lambda x: asft(Output(logits=x.shifted(x.logits)), x.shifted_labels, x.shifted(x.teacher), 0.05),
            "asft",
            {"weight": 0.05},
        )
    if (path := folder / "axolotl/src/axolotl/monkeypatch/loss/eaft.py").exists():
        weighed = load_function(path, "eaft_loss")
        for alpha, k in ((1.0, 20), (2.0, 20), (1.0, 5)):
            yield Peer(
                "Axolotl",
                lambda x, alpha=alpha, k=k: weighed(
                    Output(logits=x.shifted(x.logits)), x.shifted_labels, alpha=alpha, k=k
                ),
                "eaft",
                {"alpha": alpha, "k": k, "scale": 1.0},
            )
    if (path := folder / "axolotl/src/axolotl/integrations/kd/topk_logprob/forward_kl.py").exists():
        forward_kl = load_function(path, "loss")
        for k, temperature, renormalise in ((4, 1.0, True), (8, 2.0, True), (4, 1.0, False)):

            def top(x: Problem, k=k, temperature=temperature, renormalise=renormalise) -> Tensor:
                kept = torch.log_softmax(x.teacher / temperature, -1).topk(k)
                logs = torch.log_softmax(kept.values, -1) if renormalise else kept.values
                mask = (x.labels != -100)[None, :, None].expand(1, -1, k)
                return forward_kl(x.logits[None], kept.indices[None], logs[None], mask, 1, temperature)

            settings = {"top_k": k, "temperature": temperature, "renormalise": renormalise}
            yield Peer("Axolotl, top-k", top, "kd", settings, "sum")


def asft_and_gem(folder: Path) -> Iterator[Peer]:
    if (path := folder / "ASFT/train_v2.py").exists():
        compute_loss = load_function(path, "compute_loss")

        def anchored(x: Problem) -> Tensor:
            trainer = SimpleNamespace(mode="asft", kl_weight=0.1, get_reference_logits=lambda *_: x.shifted(x.teacher))
            output = Output(logits=x.shifted(x.logits))
            return compute_loss(trainer, lambda **_: output, {"labels": x.shifted_labels})

        yield Peer("ASFT", anchored, "asft", {"weight": 0.1})
    if (path := folder / "GEM/sft_trainer.py").exists():
        gem = load_function(path, "gem_loss")
        for h in ("linear", "logsigmoid"):
            for beta in (0.3, 0.7, 1.0):
                yield Peer(
                    "GEM",
                    lambda x, beta=beta, h=h: gem(None, x.shifted(x.logits), x.shifted_labels, beta=beta, h=h),
                    "gem",
                    {"beta": beta, "h": h},
                )


def emo(folder: Path) -> Iterator[Peer]:
    if installed("emo"):
        emo_loss = importlib.import_module("emo").EMOLoss
        for mode in (1, 2):
            yield Peer(
                "EMOLoss",
                lambda x, mode=mode: emo_loss(x.shifted(x.logits), x.shifted_labels, x.embeddings, mode=mode),
                "emo",
                {"mode": mode},
            )
    without_y = {"with_target": False}
    for name, file, skip, settings in [
        ("emo1_adaptive", "emo_patch.py", 0, {"clamp": None, **without_y}),
        ("emo2_adaptive", "emo_patch.py", 1, {"mode": 2, **without_y}),
        ("emo2_fixed", "emo_patch.py", 2, {"mode": 2, **without_y}),
        ("continual fine-tuning", "continual_finetuning/emo_llama.py", 0, without_y),
        ("instruction tuning", "instruction_tuning/emo_llama.py", 0, {"clamp": None, **without_y}),
    ]:
        if (path := folder / "EMO" / file).exists():
            code = load_lines(
                path, "Compute the MLE loss", "output = (logits,)", skip, ("hidden_states =", "logits = self", "if not")
            )

            def run(x: Problem, code=code) -> Tensor:
                of_vectors = {"lm_head": SimpleNamespace(weight=x.embeddings), "cost_embedding": x.embeddings}
                model = SimpleNamespace(config=SimpleNamespace(vocab_size=x.logits.shape[1]), **of_vectors)
                return run_lines(code, self=model, logits=x.shifted(x.logits), labels=x.shifted_labels)["loss"]

            yield Peer(f"EMO: {name}", run, "emo", settings)


class DigitTokenizer:
    """What ntloss asks of a tokenizer."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = {f"w{i}": i for i in range(vocabulary) if i not in DIGITS}
        self.vocabulary |= {str(value): token for value, token in enumerate(DIGITS)}

    def __len__(self) -> int:
        return len(self.vocabulary)

    def add_tokens(self, tokens: list[str]) -> int:
        return 0

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def numbers() -> Iterator[Peer]:
    if not installed("ntloss"):
        return
    core = importlib.import_module("ntloss.core")
    for reweigh in (False, True):
        for squash in (None, 2.0, 20.0):
            yield Peer(
                "ntloss",
                lambda x, reweigh=reweigh, squash=squash: core.NTLoss(
                    DigitTokenizer(x.logits.shape[1]), reweigh=reweigh, squash_factor=squash
                )(x.logits[None], x.labels[None]),
                "ntl",
                {"reweigh": reweigh, "squash": squash},
                "numbers",
            )
        yield Peer(
            "ntloss",
            lambda x, reweigh=reweigh: core.NTLossDotProduct(DigitTokenizer(x.logits.shape[1]), reweigh=reweigh)(
                x.logits[None], x.labels[None]
            ),
            "ntl",
            {"kind": "mse", "reweigh": reweigh},
            "numbers",
        )


def libraries() -> Iterator[Peer]:
    def torchs(x: Problem) -> Tensor:
        return F.cross_entropy(x.logits, x.labels, label_smoothing=0.1, reduction="sum") / (x.labels != -100).sum()

    yield Peer("torch", torchs, "label_smoothing", {"epsilon": 0.1})
    smoother = importlib.import_module("transformers.trainer_pt_utils").LabelSmoother(0.1)
    yield Peer(
        "transformers",
        lambda x: smoother({"logits": x.logits[None]}, x.labels[None]),
        "label_smoothing",
        {"epsilon": 0.1},
    )
    gkd = importlib.import_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    for beta, temperature in ((0, 1.0), (1, 1.0), (0.5, 0.9), (1e-3, 2.0)):
        yield Peer(
            "TRL, GKD",
            lambda x, beta=beta, temperature=temperature: gkd(
                x.logits[None], x.teacher[None], x.labels[None], beta=beta, temperature=temperature
            ),
            "kd",
            {"beta": beta, "temperature": temperature},
        )
    if installed("liger_kernel"):
        jsd = importlib.import_module("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction
        for beta in (0, 0.5, 1):
            yield Peer(
                "Liger, JSD",
                lambda x, beta=beta: (
                    jsd.distillation_loss_fn(x.logits, x.teacher, beta=beta, target=x.labels) / (x.labels != -100).sum()
                ),
                "kd",
                {"beta": beta},
            )


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --------------------------------------------------------------------------------------------------------- comparison


def count(peer: Peer, x: Problem) -> int:
    """What our sum is divided by."""
    if peer.mean_over == "sum":
        return 1
    counted = x.labels != -100
    if peer.mean_over == "numbers":
        counted &= torch.isin(x.labels, torch.tensor(DIGITS))
    if peer.mean_over == "kept":
        p = (-token_loss(x.logits, x.labels, "ce")).exp()
        counted &= p >= peer.settings["at"] if peer.settings["side"] == "top" else p <= peer.settings["at"]
    return int(counted.sum())


def compare(peer: Peer) -> list[float]:
    """Largest difference in value, largest value, largest difference in gradient, largest gradient."""
    worst = [0.0] * 4
    for size in SIZES:
        x = make_problem(*size)

        def ours(x: Problem) -> Tensor:
            values = token_loss(
                x.logits,
                x.labels,
                peer.loss,
                embeddings=x.embeddings,
                teacher_logits=x.teacher,
                number_ids=torch.tensor(DIGITS),
                number_values=torch.arange(10),
                **peer.settings,
            )
            return values.sum() / count(peer, x)

        found = []
        for function in (peer.theirs, ours):
            z = x.logits.clone().requires_grad_()
            value = function(x._replace(logits=z))
            found.append((value.detach(), torch.autograd.grad(value, z)[0]))
        (a, grad_a), (b, grad_b) = found
        now = [abs(a - b), abs(a), (grad_a - grad_b).abs().max(), grad_a.abs().max()]
        worst = [max(old, float(new)) for old, new in zip(worst, now, strict=True)]
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, default=Path("peers"))
    folder = parser.parse_args().checkouts
    lines = []
    for peers in (dft_and_beyond(folder), toolkits(folder), asft_and_gem(folder), emo(folder), numbers(), libraries()):
        for peer in peers:
            value, largest, gradient, steepest = compare(peer)
            settings = ", ".join(f"{key} {each}" for key, each in peer.settings.items())
            differences = [f"{value:.0e} of {largest:.2g}", f"{gradient:.0e} of {steepest:.2g}"]
            lines.append([peer.code, f"`{peer.loss}`", settings, *differences])
    print(markdown_table(["released code", "loss", "settings", "value", "gradient"], lines))


if __name__ == "__main__":
    main()
