"""The Qualcomm target: Hexagon NPUs, through QNN."""
