"""One package a target: what it can store, how a program is lowered, how the result runs here."""
