"""Networks: trunks, masked layers, bijections, the blocks of a ladder, a U-Net."""
