"""DD1's training pairs: made by the teacher's flow, kept in a sharded store."""
