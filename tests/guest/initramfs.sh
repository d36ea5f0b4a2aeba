#!/bin/busybox sh
# First program of a lab guest: load the disk's drivers, and go on from the root file system.
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
for m in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$m; done
/bin/busybox mount -t ext4 -o ro /dev/vda /root || exec /bin/busybox sh
for d in proc sys dev; do /bin/busybox mount -o move /$d /root/$d; done
exec /bin/busybox switch_root /root /srv/init
