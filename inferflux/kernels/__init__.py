"""The ops: signatures, backends, their selection, and the tools that check, time and tune them."""
