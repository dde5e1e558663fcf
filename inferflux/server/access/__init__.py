"""Who is asking and what they may do: principals, API keys, the chain that tries one way after another."""
