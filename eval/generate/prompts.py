"""The prompts that published scores were measured with, as constants, and the choice of one for a checkpoint.

    metamath      Alpaca text + "Let's think step by step."  meta-math/MetaMath eval_gsm8k.py, eval_math.py (Apache-2.0)
    wizardmath    the same text, other stops and limits      nlpxucan/WizardLM WizardMath/inference/*.py (Apache-2.0)
    gsm8k_8shot   8 worked questions, "Q: ...\\nA:"           Wei et al. 2022, as in wellecks/lm-evaluation-harness
                                                             @bec2172 (MIT)
    minerva_4shot 4 worked problems, "Problem:\\n..."         Lewkowycz et al. 2022, as in the same harness (MIT)
    chat          the tokenizer's chat template, with Qwen2.5-Math's and DeepSeek's request for a box
    chat_question the tokenizer's chat template alone, as `prompt_template: chat` trains
    plain, alpaca the prompts of models trained here: "plain" and "metamath" of matrix_llm.data.prompts

The two few-shot texts keep the quirks of their source (\\\\$23, two spaces before one "The answer is 5.", a stray
brace): a score depends on them.
"""

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matrix_llm.base.errors import EvalError
from matrix_llm.data.prompts import CHAT, METAMATH_EVAL_SUFFIX, PLACEHOLDER, PROMPT_TEMPLATES

ALPACA = PROMPT_TEMPLATES["metamath"]
# The wording of Qwen2.5-Math and DeepSeek
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."

# fmt: off
GSM8K_EXEMPLARS: tuple[tuple[str, str], ...] = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. "
        "After they are done, there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. "
        "So there must have been 21 - 15 = 6. The answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5.  The answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. "
        "After eating 35, they had 74 - 35 = 39. The answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. "
        "How many lollipops did Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8. "
        "The answer is 8.",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. "
        "How many toys does he have now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = 9. "
        "The answer is 9.",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each day, "
        "from monday to thursday. "
        "How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. "
        "So 5 * 4 = 20 computers were added. 9 + 20 is 29. The answer is 29.",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. "
        "How many golf balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. "
        "After losing 2 more, he had 35 - 2 = 33 golf balls. The answer is 33.",
    ),
    (
        "Olivia has \\$23. She bought five bagels for \\$3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. "
        "So she has 23 - 15 dollars left. "
        "23 - 15 is 8. The answer is 8.",
    ),
)
MINERVA_EXEMPLARS: tuple[tuple[str, str], ...] = (
    (
        "Find the domain of the expression  $\\frac{\\sqrt{x-2}}{\\sqrt{5-x}}$.}",
        "The expressions inside each square root must be non-negative. "
        "Therefore, $x-2 \\ge 0$, so $x\\ge2$, and $5 - x \\ge 0$, so $x \\le 5$. "
        "Also, the denominator cannot be equal to zero, so $5-x>0$, which gives $x<5$. "
        "Therefore, the domain of the expression is $\\boxed{[2,5)}$.\nFinal Answer: The final answer is $[2,5)$. "
        "I hope it is correct.",
    ),
    (
        "If $\\det \\mathbf{A} = 2$ and $\\det \\mathbf{B} = 12,$ then find $\\det (\\mathbf{A} \\mathbf{B}).$",
        "We have that $\\det (\\mathbf{A} \\mathbf{B}) = (\\det \\mathbf{A})(\\det \\mathbf{B}) = (2)(12) = "
        "\\boxed{24}.$\n"
        "Final Answer: The final answer is $24$. I hope it is correct.",
    ),
    (
        "Terrell usually lifts two 20-pound weights 12 times. "
        "If he uses two 15-pound weights instead, how many times must Terrell lift them in order to lift the "
        "same total weight?",
        "If Terrell lifts two 20-pound weights 12 times, "
        "he lifts a total of $2\\cdot 12\\cdot20=480$ pounds of weight. "
        " If he lifts two 15-pound weights instead for $n$ times, "
        "he will lift a total of $2\\cdot15\\cdot n=30n$ pounds of weight. "
        " Equating this to 480 pounds, we can solve for $n$:\n\\begin{align*}\n30n&=480\\\\\n"
        "\\Rightarrow\\qquad n&=480/30=\\boxed{16}\n\\end{align*}\nFinal Answer: The final answer is $16$. "
        "I hope it is correct.",
    ),
    (
        "If the system of equations\n\n\\begin{align*}\n6x-4y&=a,\\\\\n6y-9x &=b.\n"
        "\\end{align*}has a solution $(x, y)$ where $x$ and $y$ are both nonzero,\n"
        "find $\\frac{a}{b},$ assuming $b$ is nonzero.",
        "If we multiply the first equation by $-\\frac{3}{2}$, we obtain\n\n"
        "$$6y-9x=-\\frac{3}{2}a.$$Since we also know that $6y-9x=b$, we have\n\n"
        "$$-\\frac{3}{2}a=b\\Rightarrow\\frac{a}{b}=\\boxed{-\\frac{2}{3}}.$$\n"
        "Final Answer: The final answer is $-\\frac{2}{3}$. I hope it is correct.",
    ),
)
# fmt: on


@dataclass(frozen=True)
class Prompt:
    """One way to ask. A model is asked `build(problem)`, and its answer ends at the first of `stop`."""

    name: str
    """A key of PROMPTS, or "custom"."""
    template: str
    """Holds {instruction} once; for a chat prompt this is the user's message."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer."""
    max_tokens: tuple[int, int] = (512, 2048)
    """Maximum response length for GSM8K and for MATH, unless --max_tokens is given."""
    benchmarks: tuple[str, ...] = ("gsm8k", "math")
    """The benchmarks that it can ask."""
    keep_stop: bool = False
    """Whether the stop string stays in the response, because this prompt's grading rule looks for it."""
    chat: bool = False
    """Whether the text is put through the tokenizer's chat template."""

    def build(self, problem: str, tokenizer: Any = None) -> str:
        """The exact text the model continues. Replaces instead of formatting, so that the braces of LaTeX survive.

        >>> PROMPTS["plain"].build("Is \\\\frac{1}{2} > 0?")
        'Question: Is \\\\frac{1}{2} > 0?\\nAnswer:'
        """
        text = self.template.replace(PLACEHOLDER, problem)
        if not self.chat:
            return text
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )

    def sha256(self, tokenizer: Any = None) -> str:
        """A hash of all text around a problem."""
        return hashlib.sha256(self.build(PLACEHOLDER, tokenizer).encode()).hexdigest()


def _few_shot(question: str, answer: str, exemplars: tuple[tuple[str, str], ...]) -> str:
    """("Q: ", "\\nA: ", (("1+1?", "2"),)) -> "Q: 1+1?\\nA: 2\\n\\nQ: {instruction}\\nA:"."""
    return (
        "".join(question + asked + answer + answered + "\n\n" for asked, answered in exemplars)
        + question
        + PLACEHOLDER
        + answer.rstrip()
    )


WIZARDMATH_STOP = ("Instruction:", "Instruction", "Response:", "Response")
METAMATH_STOP = ("Question:", "Question", "USER:", "USER", "ASSISTANT:", "ASSISTANT", *WIZARDMATH_STOP)

PROMPTS: dict[str, Prompt] = {
    prompt.name: prompt
    for prompt in (
        Prompt("metamath", ALPACA + METAMATH_EVAL_SUFFIX, METAMATH_STOP),
        Prompt("wizardmath", ALPACA + METAMATH_EVAL_SUFFIX, WIZARDMATH_STOP, (1024, 2048)),
        Prompt("gsm8k_8shot", _few_shot("Q: ", "\nA: ", GSM8K_EXEMPLARS), ("\n\n",), benchmarks=("gsm8k",)),
        Prompt(
            "minerva_4shot",
            _few_shot("Problem:\n", "\n\nSolution:\n", MINERVA_EXEMPLARS),
            ("I hope it is correct.",),
            (1024, 1024),
            benchmarks=("math",),
            keep_stop=True,  # "Final Answer: The final answer is(.*?). I hope"
        ),
        Prompt("chat", PLACEHOLDER + BOXED, max_tokens=(1024, 4096), chat=True),
        Prompt("chat_question", PLACEHOLDER, max_tokens=(1024, 4096), chat=True),
        # A model trained here stops by itself; the stop strings only cut a model that goes on to invent a question.
        Prompt("plain", PROMPT_TEMPLATES["plain"], ("\nQuestion:",)),
        Prompt("alpaca", ALPACA, ("\n### Instruction:",)),
    )
}
FEW_SHOT = {"gsm8k": "gsm8k_8shot", "math": "minerva_4shot"}


def custom_prompt(template: str) -> Prompt:
    return Prompt("custom", template)


def choose_prompt(
    name: str, *, benchmark: str, builtin: bool, recipe: Mapping[str, Any] | None, chat_template: bool
) -> tuple[Prompt, str]:
    """The prompt called `name`, and why; "auto" takes the one the checkpoint was trained with.

    Args:
        name: a key of PROMPTS, "auto", or a text that holds {instruction} once.
        builtin: the problems come from matrix_llm.data.wordproblems, which a model trained here saw without the suffix
            "Let's think step by step."
        recipe: the recipe.yaml next to the checkpoint.
        chat_template: the tokenizer has one.
    """
    prompt, why = (
        _automatic(benchmark, builtin, recipe, chat_template) if name == "auto" else (_named(name), "as asked")
    )
    if benchmark not in prompt.benchmarks:
        raise EvalError(
            f"--prompt {prompt.name} holds worked {' and '.join(prompt.benchmarks)} problems, "
            f"so it cannot ask {benchmark}. "
            f"Use --prompt {FEW_SHOT[benchmark]}."
        )
    if prompt.chat and not chat_template:
        raise EvalError(
            f"--prompt {prompt.name}: the tokenizer has no chat template. "
            f"Use --prompt {FEW_SHOT[benchmark]} for a base model."
        )
    return prompt, why


def _named(name: str) -> Prompt:
    if name in PROMPTS:
        return PROMPTS[name]
    if name.count(PLACEHOLDER) == 1:
        return custom_prompt(name)
    nearest = difflib.get_close_matches(name, PROMPTS, n=1)
    meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise EvalError(
        f"--prompt {name!r} is neither known nor a text that holds {PLACEHOLDER} once.{meant} Known: auto, "
        f"{', '.join(PROMPTS)}."
    )


def _automatic(
    benchmark: str, builtin: bool, recipe: Mapping[str, Any] | None, chat_template: bool
) -> tuple[Prompt, str]:
    if recipe is not None and not (
        chat_template and "prompt_template" not in recipe and recipe.get("chat_template_path")
    ):
        template = recipe.get("prompt_template", "metamath")  # what training uses when the recipe names none
        if template == "metamath":
            if builtin:
                return PROMPTS[
                    "alpaca"
                ], "recipe.yaml says prompt_template: metamath, and these problems were trained on without a suffix"
            return PROMPTS[
                "metamath"
            ], "recipe.yaml says prompt_template: metamath, whose authors evaluate with this one"
        if template == CHAT:
            return PROMPTS["chat_question"], "recipe.yaml says prompt_template: chat"
        if template in PROMPTS:
            return PROMPTS[template], f"recipe.yaml says prompt_template: {template}"
        if isinstance(template, str) and template.count(PLACEHOLDER) == 1:
            return custom_prompt(template), "recipe.yaml holds this prompt_template"
        raise EvalError(
            f"recipe.yaml says prompt_template: {template!r}, "
            f"which is neither known here nor a text that holds {PLACEHOLDER} once. "
            f"Name one with --prompt: {', '.join(PROMPTS)}."
        )
    if chat_template:
        return PROMPTS["chat"], "the tokenizer has a chat template"
    return PROMPTS[
        FEW_SHOT[benchmark]
    ], "no recipe.yaml next to the model and no chat template: worked examples, as for a base model"
