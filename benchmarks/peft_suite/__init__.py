"""PEFT's own tests, run over Spectune's methods: `python benchmarks/peft_suite/run.py PEFT_CHECKOUT`."""
