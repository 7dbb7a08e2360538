"""Publish a finished run: `python -m matrix_llm.hub push runs/x --repo user/name`. The code is in publish/."""

from matrix_llm.publish.card import card_of, model_card, versions, write_card
from matrix_llm.publish.checks import check_weights
from matrix_llm.publish.command import main
from matrix_llm.publish.push import push

__all__ = ["card_of", "check_weights", "main", "model_card", "push", "versions", "write_card"]

if __name__ == "__main__":
    raise SystemExit(main())
