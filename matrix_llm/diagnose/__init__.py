"""What matrix cross-entropy and the other token losses do to one model on one set of rows, before it is trained.

Reading order: `command` (the command line), `subject` (which model, rows and settings), `positions` (the trained
positions and their hidden states), `head` (the LM head's rows), `groups` (kinds of tokens and ranges of CE),
`gradients` (losses compared by their gradients), `token_losses` (every token loss against CE), `forgiven` (what MCE
forgives, and to which tokens), `accuracy` (the solver's error), `diagnosis` (all of it, as one JSON object), `reading`
(the figures in words), then `text` and `page`, which show the object.
"""
