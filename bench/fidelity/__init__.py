"""The fidelity lab: is the learned thing in the picture, and what does the prompt lose? See docs/fidelity.md.

scale.py       how much is drawn and trained
subjects.py    the things, prompts.py what is asked of them, judging.py what a picture scores
lab.py         the model, batched sampling, and a folder that remembers
learning.py    our training and its ablations
methods.py     ours, in every variant; peers.py everybody else, by their real libraries
sections.py    which rows there are
running.py     rows that are missing, one after the other
report.py      tables and plots, from rows alone
real.py        real checkpoints, by CLIP and DINO
"""
