"""Texts that the tiny tokenizer is trained on."""

SENTENCES = [
    "Question: Mia has 12 pens and buys 30 more. How many pens does Mia have?\n"
    "Answer: 12 + 30 = 42.\nThe answer is: 42",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "A train drives 80 km an hour for 3 hours. How far does it drive? 80 * 3 = 240.\nThe answer is: 240",
]
