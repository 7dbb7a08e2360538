"""From generations to scores that people can read. Every score names its convention.

Read `scores` first (verdicts, counts, the summary of a run), then what shows them: `table` as Markdown for the terminal
(with `precision`, what a score cannot tell, below it), `page` as one HTML file (with `page.html.j2`), and `comparison`,
the description of two runs that eval/compare.py prints.
"""
