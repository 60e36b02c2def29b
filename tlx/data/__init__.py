"""Images: shards and their index, the order of samples, decoding, transforms, batches; README.md says how it fits.

==========  ==========================================================================================================
`shards`    tars: the index over a folder of them (`manifest`), made for any tars (`index`), labels and classes, `check`
`build`     shards from folders, CSV files and data sets of torchvision
`stream`    the order of an epoch, the dealing of a batch, reading, worker processes, batches, mixing, to the device
`pixels`    decoding, whole or where the crop shows it, by the C `extension` or Pillow; transforms; orientation
`remote`    shards elsewhere, kept on this machine while they are needed
==========  ==========================================================================================================
"""
