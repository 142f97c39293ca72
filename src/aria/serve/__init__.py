"""The server that speaks OpenAI's protocol. It needs the extra ``aria-moe[serve]``."""
