"""A page that inspects any adapter or model, as a Hugging Face Space."""
