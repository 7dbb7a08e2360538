"""What a recipe asks of TRL, transformers and this machine, tried before a row is read or a weight is loaded.

Read combinations.py (settings that do not go together, and the list of all checks), keys.py (what becomes of each of
SFTConfig's keys), evaluation.py (metrics, the best checkpoint, early stopping), optimizer.py (optimizer and schedule,
built for one small layer), token_loss.py (the loss, its settings and its teacher), machine.py (packages and devices),
engines.py (the settings inside fsdp_config and the DeepSpeed config) and sharding.py (how a run is spread over
processes).
"""
