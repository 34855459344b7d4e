"""mini-3H: a synthetic world in which helpful, honest and harmless conflict, trained on a CPU in two minutes.

world.py       people, facts, and what train, validation and test may ask
vocabulary.py  the words and the tokenizer
data.py        six skills as prompt and answer; what each role reads
batches.py     documents drawn and padded
model.py       a Llama of 0.8 million parameters
training.py    settings and the training loop
harness.py     the door for lm-eval's YAML files
"""
