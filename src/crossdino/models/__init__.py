"""The networks: the detector of Fig. 4 and its parts."""
