"""The Ethos-U target: Arm's NPUs for microcontrollers."""
