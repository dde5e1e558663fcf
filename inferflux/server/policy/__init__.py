"""What administrators decide at run time: the policy document, and the file that keeps it."""
