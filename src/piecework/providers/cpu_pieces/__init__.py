"""C++ that is compiled into pieces: what the code generator's libraries do slowly for few tokens."""
