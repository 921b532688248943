"""Who moves the weights: one process (`local`) or torchrun with DeepSpeed's ZeRO (`deepspeed`), behind one interface
(`base.Engine`)."""
