"""Will a model fit, on which machine, and how fast at best; asked without that machine.

target.py     a machine by name: "v5e:4x4", "h100:8", "cpu"
programs.py   the programs that would run, compiled for a TPU slice from shapes alone
plan.py       bytes, tokens a second and a verdict
report.py     the same as text and as a picture
"""
