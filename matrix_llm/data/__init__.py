"""From a file to token ids and labels. No module here loads torch.

Read in this order: forms (what a row is, with messages for conversations), readers (files to rows, with jsonarray),
prompts, chat (conversations to text, and what of it is trained), tokens (rows to ids and labels), selection (which rows
can be trained on), cache, rowset (read and tokenised once), streaming (without a cache). Independent of these: leakage
(test questions among the rows) and wordproblems (the generator for "builtin").
"""
