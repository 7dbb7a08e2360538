"""Publish a finished run: `python -m matrix_llm.hub push runs/x --repo user/name`. The code is in `matrix_llm/publish/`."""

from matrix_llm.publish.push import card_of, check_weights, main, model_card, push, versions, write_card

__all__ = ["card_of", "check_weights", "main", "model_card", "push", "versions", "write_card"]

if __name__ == "__main__":
    raise SystemExit(main())
