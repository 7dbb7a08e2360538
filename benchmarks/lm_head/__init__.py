"""CE + MCE straight from hidden states, against the cross-entropy alone of every peer: time, memory and accuracy.

Read in this order: inputs (shapes and random inputs), implementations (what is compared), timing, memory and child (a
process whose memory is measured), accuracy (the reference, and errors against it), training_step (a complete step),
store (the JSON file of rows), tables and plots (made from the JSON alone, so that no figure is copied by hand),
command.

Of every token loss beside its peers: loss_inputs, losses (what is compared), whole_logits (formulas by autograd),
loss_cost (time and memory), loss_tables.
"""
