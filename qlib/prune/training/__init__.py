"""The pruners that a schedule may name: one family a file."""
