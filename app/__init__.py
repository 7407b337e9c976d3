"""The LLM gateway. Read `Gateway.serve` in `gateway.py` first."""
