"""When parity fails: the first operator, pass, module or stored tensor that differs."""
