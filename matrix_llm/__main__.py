"""`python -m matrix_llm COMMAND ...`: the console command, for launchers that start modules."""

from matrix_llm.cli import run

if __name__ == "__main__":
    run()
