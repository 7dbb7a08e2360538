"""A process whose memory is measured: prints one JSON object. Started by benchmarks/lm_head/memory.py."""

import json
import sys

from benchmarks.lm_head.inputs import Shape
from benchmarks.lm_head.memory import loss_memory, token_loss_memory
from benchmarks.lm_head.training_step import Step, make_steps, step_memory

if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    if "step" in task:
        step = Step(**task["task"])
        found = step_memory(make_steps(step)[task["step"]], step.device)
    elif "loss" in task:
        found = token_loss_memory(task["loss"], task["name"], Shape(*task["shape"]), task["seed"])
    else:
        found = loss_memory(task["name"], Shape(*task["shape"]), task["seed"])
    print(json.dumps(found))
