"""Models: from a folder to a decoder or an encoder, by a spec and a catalog of families."""
