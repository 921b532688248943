"""SkyReels-V1-I2V."""
