"""Tools that every other room uses; nothing here knows about models, rows or losses.

Read errors and files first, then values and reader (how a recipe becomes checked settings). The others are single
tools: console, text, secrets, safe_yaml, limits, gpus, statistics, decoding, modes, weights, threads, processes,
vllm_server. All but modes load without torch.
"""
