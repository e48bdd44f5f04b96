accelerate launch train_unconditional.py \
  --train_data_dir="./data/flowers" --resolution=64 --center_crop --random_flip \
  --output_dir="./output/ddpm-flowers" --train_batch_size=16 --num_epochs=100 --use_ema \
  --gradient_accumulation_steps=1 --learning_rate=1e-4 --lr_warmup_steps=500 --mixed_precision=no
