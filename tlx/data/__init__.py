"""Images: shards and their index, the order of samples, decoding, transforms, batches. Import from the modules below.

=============  =============================================================================================
`order`        the order of samples and the dealing of a batch: pure arithmetic (numpy only)
`manifest`     the index over a folder of tars (numpy only)
`remote`       files of a folder elsewhere, its `location` a URL or a command; `shard_cache`: kept on this machine;
               `cache_room`: who leaves for whom; `ahead`: fetched before they are wanted; `file_lock`: once per node
`reader`       bytes of one sample; `decode`: bytes to a picture; `transforms`: a picture to a view of it
`mix`          mixup and cutmix
`stream`       batches for training and for evaluation
`sources`      folders, CSV files and torchvision data sets; `write`: shards from them; `index`: an index for tars
               made elsewhere; `check`: reads everything, counts
=============  =============================================================================================
"""
