"""AdapterBank behind the wire format of OpenAI: every row of a batch is another adapter."""
