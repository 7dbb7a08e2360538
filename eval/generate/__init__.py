"""Responses from a model: asked once, saved as they come, graded at the end. eval/score.py, eval/gsm8k.py and
eval/hendrycks_math.py run it.

Read `options` and `run` first, for the steps of a run. Then what they use: `tasks` (the benchmarks, with `sources` for
where their rows are and `rows` for how each is read into a problem and its gold), `prompts`, `models` (where a model
is), `generation` (what an engine is asked for and returns), `engines` (which one: `transformers_engine`, `vllm_engine`
with `vllm_start`, or `server_engine`) and `run_files` (what is on disk, and how a killed run resumes).
"""
