"""Everything that knows the inside of transformers: loading, text decoders, support checks, private names."""
