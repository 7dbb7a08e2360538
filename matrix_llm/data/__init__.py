"""From a file to token ids and labels. No module here loads torch.

Read in this order: forms (what a row is, with messages for conversations), entries (the data sets of a recipe), readers
(where rows come from, with folders, and formats and jsonarray for their files), prompts, chat (conversations to text,
and what of it is trained), tokens (rows to ids and labels), selection (which rows can be trained on), mixture (one data
set of several), cache, rowset (read and tokenised once), streaming (without a cache). Independent of these: leakage
(test questions among the rows, with questions for their spelling) and wordproblems (the generator for "builtin", with
the stories that it tells).
"""
