"""Pages for people: the one at /, and the interface at /docs."""
