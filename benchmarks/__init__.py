"""What measures speed and memory; records with device, versions and commit stand in results/."""
