"""Images: shards and their index, the order of samples, decoding, transforms, batches. Import from the modules below.

===============  ===========================================================================================
`order`          the order of samples and the dealing of a batch, `sampling`: which make an epoch (numpy only)
`manifest`       the index over a folder of tars (numpy only); `reader`: bytes of one sample
`remote`         files of a folder elsewhere, its `location` a URL, command, path; `shard_cache`: kept on this machine;
                 `cache_room`: who leaves for whom; `ahead`: fetched before they are wanted
`framing`        which part of a picture is shown, before there are pixels; `framed`: a transform list that begins so
`regions`        JPEGs decoded only there, by the C `extension`; `decode`: any picture, whole
`transforms`     a picture to a view of it; `pictures`: samples to views; `mix`: mixup and cutmix
`stream`         batches for training and for evaluation; `loader`: what its `workers` do, writing to `slots`;
                 `transfer`: to the device
`sources`        folders, CSV files and torchvision data sets (`specs`, `tables`, `datasets`); `write`: shards from them
                 (`content`, `markers`, `heif`, `notes`, `threads`; `build_tasks`, `build_folder`, `build_parts`);
                 `index`: an index for tars made elsewhere (`labels`, `tars`); `check`: reads everything (`examine`,
                 `statistics`, `duplicates`); `class_names`: which class a label is; `class_warnings`: classes that
                 were hardly meant; `passed_over`: what is no sample, counted and named
===============  ===========================================================================================
"""
