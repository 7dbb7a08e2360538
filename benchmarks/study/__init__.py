"""The controlled study: does matrix cross-entropy help?

One recipe, several losses, several seeds, everything else equal.

Read preregistration.md first (the questions, and the rules of decision, written before the runs), then design (the
arms), folder (what a study leaves on disk), run (trains and measures them) with measure, likelihood and decoding,
launch and collect (runs too large for this machine), statistics and analysis (the verdicts), power and limits (what
the study could have found), tables, plots and report (docs/results.md), rereport (the same from the committed rows),
and command.
"""
